# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How much a metric depends on each layer group."""
import math
from dataclasses import dataclass
from typing import Callable, Dict, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.temporarily import Snapshot

from .scored import group_scores
from .scores.base import Progress
from .select import Selection
from .surgery import channels_off
from .units import LayerGroup

# Shares of the sum of a group's squared scores that are removed. Shares of the channels would
# not do: after sparse training most of them carry nothing, and their loss cannot be measured.
SHARES = (0.05, 0.2)
# Smaller drops, as shares of the metric, cannot be told from noise
LEAST_DROP = 0.002
# Groups differ at most so much from the median
MAX_FACTOR = 20.


@dataclass
class Sensitivity:
    """The metric with some channels of one group removed at a time."""
    baseline: float  # the metric of the model as it is
    metrics: Dict[str, Dict[float, float]]  # by group and removed share of the squared scores
    costs: Dict[str, float]  # drop for the removed squared scores, relative to the median group


def measure_sensitivity(model: nn.Module, selection: Selection, groups: Sequence[LayerGroup],
                        evaluate: Callable[[nn.Module], float],
                        compensate: Callable[[Dict[str, Tensor]], None],
                        progress: Progress) -> Sensitivity:
    """Prune each group alone, compensate, and evaluate; the model is left as it was."""
    steps = 1 + len(groups) * len(SHARES)
    progress('sensitivity', 0, steps)
    baseline = evaluate(model)
    metrics: Dict[str, Dict[float, float]] = {}
    costs: Dict[str, float] = {}
    for group in groups:
        metrics[group.name] = {}
        drops = removed_squares = 0.
        for share in SHARES:
            progress('sensitivity', 1 + len(SHARES) * len(costs) + len(metrics[group.name]), steps)
            removed = selection.removed({group.name: _threshold(selection, group, share)})
            metric = _metric_without(model, selection, removed, evaluate, compensate)
            metrics[group.name][share] = metric
            drops += max(baseline - metric, LEAST_DROP * abs(baseline))
            removed_squares += sum(
                float(item.best_scores[removed[item.unit.name]].square().sum())
                for item in selection.scored if item.unit.name in removed)
        costs[group.name] = drops / removed_squares if removed_squares else math.nan
    progress('sensitivity', steps, steps)
    return Sensitivity(baseline, metrics, _relative(costs))


def _threshold(selection: Selection, group: LayerGroup, share: float) -> float:
    """Return the threshold below which a share of the sum of a group's squared scores lies."""
    scores = group_scores(selection.scored, group).sort().values
    sums = scores.square().cumsum(0)
    number = int(torch.searchsorted(sums, share * sums[-1], right=True))
    return float(scores[max(number, 1) - 1])


def _relative(costs: Dict[str, float]) -> Dict[str, float]:
    """Divide costs by their median, within bounds; 1 where nothing could be removed."""
    known = sorted(cost for cost in costs.values() if cost > 0)
    middle = known[len(known) // 2] if known else 1.
    return {name: 1. if math.isnan(cost) else min(MAX_FACTOR, max(1 / MAX_FACTOR, cost / middle))
            for name, cost in costs.items()}


def _metric_without(model: nn.Module, selection: Selection, removed: Dict[str, Tensor],
                    evaluate: Callable, compensate: Callable) -> float:
    """Evaluate the model without some channels."""
    snapshot = Snapshot(model)
    try:
        compensate(removed)
        with channels_off(model, [item.unit for item in selection.scored], removed):
            return evaluate(model)
    finally:
        snapshot.restore()

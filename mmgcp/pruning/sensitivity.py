# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How much depends on each layer group: measured by pruning it alone."""
import math
import numbers
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Dict, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.temporarily import Snapshot

from .scored import group_scores
from .scores.base import Progress
from .select import Selection
from .surgery import channels_off
from .units import ChannelUnit, LayerGroup

# A metric is measured without these shares of the sum of a group's squared scores. Shares of
# its channels would not do: after sparse training most carry nothing, and are not missed.
SHARES = (0.05, 0.2)
# Where positions decide, it is measured without this share of the channels
POSITION = 0.5
# Smaller drops, as shares of the metric, cannot be told from noise
LEAST_DROPS = {False: 0.002, True: 0.01}  # by whether positions decide
# Groups differ at most so much from the median
MAX_FACTOR = 20.


@dataclass
class Sensitivity:
    """The metric with some channels of one group removed at a time."""
    baseline: float  # the metric of the model as it is
    metrics: Dict[str, Dict[float, float]]  # by group and removed share
    costs: Dict[str, float]  # drop for what was removed, relative to the median group


def measure_sensitivity(model: nn.Module, selection: Selection, groups: Sequence[LayerGroup],
                        by_position: bool, evaluate: Callable[[nn.Module], float],
                        compensate: Callable[[Dict[str, Tensor]], Any],
                        progress: Progress, least: float = -math.inf) -> Optional[Sensitivity]:
    """Prune each group alone, compensate, and evaluate; the model is left as it was.

    A drop is for squared scores, or for channels if the scores of the selection are positions.
    With a metric below ``least`` drops would tell nothing, and there is a warning and no result.
    """
    shares = (POSITION, ) if by_position else SHARES
    units = [item.unit for item in selection.scored]
    steps = 1 + len(groups) * len(shares)
    progress('sensitivity', 0, steps)
    baseline = _finite(evaluate(model), 'the unpruned detector')
    if baseline < least:
        warnings.warn(f'the detector has a metric of {baseline:.3f} on the calibration images: too '
                      'little to measure what depends on which layer group, so all lose the same '
                      'share', stacklevel=2)
        progress('sensitivity', steps, steps)
        return None
    metrics: Dict[str, Dict[float, float]] = {}
    costs: Dict[str, float] = {}
    for group in groups:
        metrics[group.name] = {}
        drops = amount = 0.
        for share in shares:
            progress('sensitivity', 1 + len(shares) * len(costs) + len(metrics[group.name]), steps)
            threshold = share if by_position else _threshold(selection, group, share)
            removed = selection.removed({group.name: threshold})
            metric = metric_without(model, units, removed, evaluate, compensate)
            metrics[group.name][share] = metric
            drops += max(baseline - metric, LEAST_DROPS[by_position] * abs(baseline))
            amount += sum(
                len(channels) if by_position else float(best[channels].square().sum())
                for best, channels in ((item.best_scores, removed[item.unit.name])
                                       for item in selection.scored if item.unit.name in removed))
        costs[group.name] = drops / amount if amount else math.nan
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


def _finite(metric: Any, what: str) -> float:
    """Return a metric, or raise a PruningError if it is no finite number."""
    if not isinstance(metric, numbers.Real) or not math.isfinite(metric):
        raise PruningError(f'the metric of {what} must be a finite number, but is {metric!r}')
    return float(metric)


def metric_without(model: nn.Module, units: Sequence[ChannelUnit], removed: Dict[str, Tensor],
                   evaluate: Callable[[nn.Module], float],
                   compensate: Callable[[Dict[str, Tensor]], Any]) -> float:
    """Evaluate a model without channels (K, ) by name of the unit, compensated, and put it back."""
    snapshot = Snapshot(model, weights=True)  # reconstruction changes them in place
    try:
        compensate(removed)
        with channels_off(model, units, removed):
            return _finite(evaluate(model), 'a pruned detector')
    finally:
        snapshot.restore()

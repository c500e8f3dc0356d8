# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How much a metric depends on each layer group."""
from dataclasses import dataclass, replace
from typing import Callable, Dict, Sequence

import torch.nn as nn
from torch import Tensor

from .masking import Snapshot, channels_off
from .planner import Planner, group_scores, thresholds_of_groups
from .structures import LayerGroup

RATIOS = (0.25, 0.5)
# A group is taken to cost at least so much of the metric if all of it is removed: less
# cannot be told from noise
LEAST_DROP = 0.02


@dataclass
class Sensitivity:
    """The metric with some channels of one group removed at a time.

    Attributes:
        baseline (float): The metric of the model as it is.
        metrics (Dict[str, Dict[float, float]]): The metric by group and pruning ratio.
        costs (Dict[str, float]): Cost of a channel by group: the coefficient of the cubic
            of the ratio that fits the drops of the metric best, divided by the number of
            channels; see :func:`mmgcp.pruning.budget.find_thresholds`.
    """
    baseline: float
    metrics: Dict[str, Dict[float, float]]
    costs: Dict[str, float]


def measure_sensitivity(model: nn.Module, planner: Planner, groups: Sequence[LayerGroup],
                        evaluate: Callable[[nn.Module], float],
                        compensate: Callable[[Dict[str, Tensor]], None],
                        report: Callable[[str, int, int], None]) -> Sensitivity:
    """Prune each group alone and measure what it costs.

    Args:
        model (nn.Module): The model, left as it was.
        planner (Planner): Chooses the channels.
        groups (Sequence[LayerGroup]): The groups.
        evaluate (Callable): Gives the metric of a model; higher is better.
        compensate (Callable): Compensates the model in place for removed channels.
        report (Callable): Called with what is done, steps done, and steps in all.

    Returns:
        Sensitivity: What was measured.
    """
    steps = 1 + len(groups) * len(RATIOS)
    report('sensitivity', 0, steps)
    baseline = evaluate(model)
    metrics: Dict[str, Dict[float, float]] = {}
    costs: Dict[str, float] = {}
    for group in groups:
        metrics[group.name] = {}
        for ratio in RATIOS:
            report('sensitivity', 1 + len(RATIOS) * len(costs) + len(metrics[group.name]), steps)
            alone = replace(group, ratio=ratio, threshold=None)
            removed = planner.choose(thresholds_of_groups(planner.scored, [alone]))
            metrics[group.name][ratio] = _metric_without(model, planner, removed, evaluate,
                                                         compensate)
        drops = {ratio: baseline - metric for ratio, metric in metrics[group.name].items()}
        costs[group.name] = (_fit_cubic(drops, LEAST_DROP * abs(baseline))
                             / len(group_scores(planner.scored, group)))
    report('sensitivity', steps, steps)
    return Sensitivity(baseline, metrics, costs)


def _fit_cubic(drops: Dict[float, float], least: float) -> float:
    """The a of a * ratio**3 that fits drops best, at least some value above zero."""
    fitted = (sum(drop * ratio**3 for ratio, drop in drops.items())
              / sum(ratio**6 for ratio in drops))
    return max(fitted, least, 1e-9)


def _metric_without(model: nn.Module, planner: Planner, removed: Dict[str, Tensor],
                    evaluate: Callable, compensate: Callable) -> float:
    """The metric of the model without some channels."""
    snapshot = Snapshot(model)
    try:
        compensate(removed)
        with channels_off(model, [item.coupled for item in planner.scored], removed):
            return evaluate(model)
    finally:
        snapshot.restore()


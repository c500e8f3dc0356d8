# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How much each layer group loses: from ratios, thresholds, shares or a budget to thresholds.

A threshold decides how many channels a unit loses in one of two ways. With the allocation
'global' it is compared with the scores, so that units with low scores lose more. With 'uniform'
it is compared with the positions of the channels in their units, so that all units of a group
lose the same share.
"""
import math
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.nn.temporarily import Snapshot

from .budget import Budget, find_thresholds
from .cost import CostModel
from .scored import ScoredUnit, group_scores, share_scores
from .scores import Criterion
from .scores.base import Progress
from .select import MERGES, Selection, Thresholds
from .surgery import channels_off
from .units import ChannelUnit, LayerGroup

# Sensitivity is measured without these shares of the sum of a group's squared scores. Shares of
# its channels would not do: after sparse training most carry nothing, and are not missed.
SHARES = (0.05, 0.2)
# Smaller drops, as shares of the metric, cannot be told from noise
LEAST_DROP = 0.002
# Groups differ at most so much from the median
MAX_FACTOR = 20.


def allocate(selection: Selection, groups: Sequence[LayerGroup], cost: CostModel, budget: Budget,
             sensitivities: Optional[Dict[str, float]]) -> Thresholds:
    """Find the thresholds of all layer groups: their own, or those that meet the budget.

    Raises a PruningError if the budget cannot be met or nothing decides a group.
    """
    thresholds = thresholds_of_groups(selection.scored, groups)
    if budget:
        return find_thresholds(selection, groups, cost, thresholds, budget, sensitivities)
    if len(thresholds) < len(groups):
        missing = [group.name for group in groups if group.name not in thresholds]
        raise PruningError(f'layer groups {missing} have neither a ratio nor a threshold, and no '
                           'ratio or budget is given (ratio, target_params, target_flops)')
    return thresholds


def thresholds_of_groups(scored: Iterable[ScoredUnit],
                         groups: Iterable[LayerGroup]) -> Thresholds:
    """Find the thresholds of the groups that state a threshold or a ratio.

    A ratio r stands for the value that the share r of the group's scores, over all of its
    layers, does not exceed: the floor(r * K)-th smallest of K.
    """
    thresholds = {}
    for group in groups:
        if group.threshold is not None:
            thresholds[group.name] = group.threshold
        elif group.ratio is not None:
            values = group_scores(scored, group).sort().values
            thresholds[group.name] = quantile(values, group.ratio)
    return thresholds


def quantile(values: Tensor, ratio: float) -> Optional[float]:
    """Return the floor(ratio * K)-th of ascending values (K, ), None for the zeroth."""
    number = max(0, int(len(values) * ratio + 1e-9))
    return float(values[number - 1]) if number else None


class EqualShares(Criterion):
    """Scores for units of which only the number of channels to remove matters."""

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return numbers (C, ) for each layer with weights, NaN where it has no channel."""
        numbers = torch.arange(unit.size) if unit.norm_groups is None else unit.norm_groups
        return {item.module: numbers.double().masked_fill(~unit.mask(item.unit_index), math.nan)
                for item in unit.side('out')
                if isinstance(find_layer(model, item.module), WEIGHT_TYPES)}


def by_position(scored: Sequence[ScoredUnit], merge: str) -> List[ScoredUnit]:
    """Replace scores by :func:`positions`, so that a threshold removes the same share of each unit.

    The merge rule joins the scores of the layers of a unit; all get the same positions.
    """
    placed = []
    for item in scored:
        zero = item.all_scores.new_zeros(len(item.all_scores), 1)
        found = positions(item.unit, MERGES[merge].margins(item.all_scores, zero))
        placed.append(replace(item, scores={
            layer: found.masked_fill(scores.isnan(), math.nan)
            for layer, scores in item.scores.items()}))
    return placed


def positions(unit: ChannelUnit, scores: Tensor) -> Tensor:
    """Return the positions (C, ) of the scores (C, ) of a unit among channels that are alike.

    The i-th lowest of n alike channels has (i + 0.5) / n, so that a threshold t removes t * n of
    them, rounded. Channels in other layers, or in another group of a grouped convolution, are
    not alike. Channels that only go together share their mean position.
    """
    groups = torch.zeros(unit.size).long() if unit.conv_groups is None else unit.conv_groups
    memberships = [groups, *(unit.mask(item.unit_index).long() for item in unit.slices)]
    kinds = torch.stack(memberships).unique(dim=1, return_inverse=True)[1]
    found = torch.zeros(unit.size, dtype=torch.double)
    for kind in kinds.unique():
        alike = (kinds == kind).nonzero().flatten()
        alike = alike[scores[alike].sort(stable=True).indices]
        found[alike] = (torch.arange(len(alike)).double() + 0.5) / len(alike)
    return share_scores(found, unit)


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
    snapshot = Snapshot(model, weights=True)
    try:
        compensate(removed)
        with channels_off(model, [item.unit for item in selection.scored], removed):
            return evaluate(model)
    finally:
        snapshot.restore()

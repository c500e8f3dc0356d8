# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Thresholds that leave a given share of parameters or MACs."""
from dataclasses import dataclass, replace
from typing import Dict, Iterable, Optional, Sequence, Set, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import ConvStatistics
from mmgcp.errors import PruningError
from mmgcp.nn.layers import NORM_TYPES, find_layer

from .planner import Planner, ScoredUnit, Thresholds
from .surgery import gather_channels
from .units import ChannelSlice, ChannelUnit, LayerGroup

SHARES = ('parameters', 'MACs')
# Factors for thresholds below and above all scores; the latter for a highest score of one.
# Scores of zero are a little less.
LOWEST, HIGHEST = -1e-6, 1e6


class CostModel:
    """The parameters and MACs of a pruned model, computed from its plan.

    Args:
        model (nn.Module): The model before pruning.
        convs (dict[str, ConvStatistics]): See :func:`mmgcp.analysis.record_convs`.
        units (Sequence[ChannelUnit]): Its channel units.
    """

    def __init__(self, model: nn.Module, convs: Dict[str, ConvStatistics],
                 units: Sequence[ChannelUnit]):
        self.convs = convs
        self.units = units
        self.params = sum(param.numel() for param in model.parameters())
        self.macs = sum(conv.macs for conv in convs.values())
        # What a channel costs beside the weights of convolutions and linear layers
        self.per_channel: Dict[str, int] = {}
        for unit in units:
            for item in unit.side('out'):
                layer = find_layer(model, item.module)
                if isinstance(layer, nn.Parameter):
                    self.per_channel[item.module] = 1
                elif isinstance(layer, NORM_TYPES):
                    self.per_channel[item.module] = sum(1 for _ in layer.parameters())
                else:
                    self.per_channel[item.module] = int(layer.bias is not None)

    def __call__(self, removed: Dict[str, Tensor]) -> Tuple[int, int]:
        """Compute parameters and MACs that remain.

        Args:
            removed (dict[str, Tensor]): Channels to remove, by name of the unit.

        Returns:
            tuple[int, int]: Parameters, and MACs for one image.
        """
        counts = {key: len(channels)
                  for key, channels in gather_channels(self.units, removed).items()}
        params, macs = self.params, self.macs
        for name in {name for name, _ in counts}:
            fewer_in, fewer_out = counts.get((name, 'in'), 0), counts.get((name, 'out'), 0)
            params -= fewer_out * self.per_channel.get(name, 0)
            if name in self.convs:
                conv = self.convs[name]
                fewer = conv.weights - conv.pruned(fewer_in, fewer_out).weights
                params -= fewer
                macs -= fewer * conv.positions
        return params, macs

    def costs(self, unit: ChannelUnit) -> Tuple[float, float]:
        """Parameters and MACs, as shares of the model's, that a channel of a unit costs."""
        params, macs = 0, 0
        for item in unit.slices:
            channels = len(item.channels)
            params += self.per_channel.get(item.module, 0) * channels * (item.side == 'out')
            if item.module in self.convs:
                conv = self.convs[item.module]
                weights = channels * self._weights_of_channel(conv, item)
                params += weights
                macs += weights * conv.positions
        return params / unit.size / self.params, macs / unit.size / self.macs

    @staticmethod
    def _weights_of_channel(conv: ConvStatistics, item: ChannelSlice) -> int:
        return conv.weights // (conv.out_channels if item.side == 'out' else conv.in_channels)


@dataclass
class Budget:
    """What has to remain.

    Attributes:
        params (float, optional): Share of the parameters.
        flops (float, optional): Share of the MACs.
        tolerance (float): Accepted relative deviation. Defaults to 0.01.
    """
    params: Optional[float] = None
    flops: Optional[float] = None
    tolerance: float = 0.01

    def __post_init__(self):
        for name, target in (('target_params', self.params), ('target_flops', self.flops)):
            if target is not None and not 0 < target <= 1:
                raise PruningError(f'{name} is the share to keep, in (0, 1], but is {target}')

    def __bool__(self) -> bool:
        return self.params is not None or self.flops is not None


def find_thresholds(planner: Planner, groups: Sequence[LayerGroup], cost: CostModel,
                    fixed: Thresholds, budget: Budget,
                    costs: Optional[Dict[str, float]] = None) -> Thresholds:
    """Find the thresholds of groups that meet a budget.

    A channel's removal costs about its squared score in accuracy, times the cost of its
    group, and gains its parameters and MACs. The thresholds minimise the sum of
    costs for what is gained: in group g it is sqrt(x * gain_g / cost_g), with the mean gain
    of the group's channels and one factor x for all groups, found by bisection. Where both
    shares are asked for, gain_g is params_g**(1 + t) * operations_g**(-t), and t is bisected
    as well.

    Args:
        planner (Planner): Makes the plans.
        groups (Sequence[LayerGroup]): The layer groups; those in ``fixed`` stay.
        cost (CostModel): Gives what remains.
        fixed (dict[str, float | None]): Thresholds that are not to be searched.
        budget (Budget): What has to remain.
        costs (dict[str, float], optional): Costs of groups, 1 for those that are not in it.

    Returns:
        dict[str, float | None]: Threshold by name of the group.

    Raises:
        PruningError: The budget cannot be met; says the least that can.
    """
    scored = planner.scored
    free = [group for group in groups if group.name not in fixed]
    if not free:
        raise PruningError('every layer group has a ratio or a threshold: nothing is left '
                           'that a budget could decide')
    search = _Search(
        gains={group.name: _mean_costs(scored, group, cost) for group in free},
        costs={group.name: (costs or {}).get(group.name, 1.) for group in free},
        top=max(1e-6, *(float(item.best_scores.max()) for item in scored)),
        fixed=fixed,
        planner=planner,
        cost=cost)
    if budget.flops is None:
        return search.meet(0, budget.params, 0., budget.tolerance)
    if budget.params is None:
        return search.meet(1, budget.flops, -1., budget.tolerance)
    return search.meet_both(budget)


@dataclass
class _Search:
    """A search for thresholds.

    Attributes:
        gains (Dict): Mean parameters and MACs of a channel, by group.
        costs (Dict): Cost of each group.
        top (float): The highest score.
        fixed (Dict): Thresholds that stay.
        planner (Planner): Chooses the channels.
        cost (CostModel): Gives what remains.
    """
    gains: Dict[str, Tuple[float, float]]
    costs: Dict[str, float]
    top: float
    fixed: Thresholds
    planner: Planner
    cost: CostModel

    def shares(self, thresholds: Thresholds) -> Tuple[float, float]:
        """What remains of parameters and MACs with thresholds."""
        params, macs = self.cost(self.planner.choose(thresholds))
        return params / self.cost.params, macs / self.cost.macs

    def thresholds(self, factor: float, mix: float) -> Thresholds:
        """The thresholds for a factor, which is that of the median group."""
        relative = {name: (params**(1 + mix) * macs**-mix / self.costs[name])**0.5
                    for name, (params, macs) in self.gains.items()}
        middle = sorted(relative.values())[len(relative) // 2]
        return {**self.fixed,
                **{name: factor * value / middle for name, value in relative.items()}}

    def meet(self, index: int, target: float, mix: float, tolerance: float) -> Thresholds:
        """Meet the target for the share of parameters (0) or MACs (1) from below."""
        share, thresholds = self.approach(index, target, mix, tolerance)
        if share < target * (1 - tolerance) and self.planner.round_to == 1:
            raise PruningError(f'{target:.1%} of the {SHARES[index]} cannot be met within '
                               f'{tolerance:.0%}: the nearest share below is {share:.1%}')
        return thresholds

    def approach(self, index: int, target: float, mix: float,
                 tolerance: float) -> Tuple[float, Thresholds]:
        """Find the share nearest to a target from below, and its thresholds."""
        least, _ = self._range(index, mix)
        if least > target * (1 + tolerance):
            raise PruningError(f'{target:.1%} of the {SHARES[index]} cannot be reached: these '
                               f'layer groups and limits leave {least:.1%} at least')
        if least > target:
            return least, self.thresholds(HIGHEST * self.top, mix)
        low, high = LOWEST, self.top
        while (share := self.shares(self.thresholds(high, mix))[index]) > target:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            found = self.shares(self.thresholds(middle, mix))[index]
            if found > target:
                low = middle
                continue
            high, share = middle, found
            if share >= target * (1 - tolerance / 20):
                break
        below, above = self.thresholds(high, mix), self.thresholds(low, mix)
        tried = [(share, below)]
        stepping = self._groups_between(below, above)
        rest = {name: gain for name, gain in self.gains.items() if name not in stepping}
        if share >= target * (1 - tolerance) or len(rest) in (0, len(self.gains)):
            return tried[0]
        # One step is too large: take it and let the other groups keep more, or if they cannot
        # keep that much, leave it and let them keep less
        for side in (below, above):
            fixed = {**self.fixed, **{name: side[name] for name in self.gains if name in stepping}}
            search = replace(self, gains=rest, fixed=fixed)
            least, most = search._range(index, mix)
            if least <= target < most:
                tried.append(search.approach(index, target, mix, tolerance))
                break
            if most <= target:
                tried.append((most, search.thresholds(LOWEST, mix)))
        return max(tried, key=lambda item: item[0])

    def _range(self, index: int, mix: float) -> Tuple[float, float]:
        """The least and the largest share that thresholds can leave."""
        least, most = (self.shares(self.thresholds(factor, mix))[index]
                       for factor in (HIGHEST * self.top, LOWEST))
        return least, most

    def _groups_between(self, below: Thresholds, above: Thresholds) -> Set[str]:
        """The groups of the units in which two thresholds choose differently."""
        first, second = self.planner.choose(below), self.planner.choose(above)
        return {name for item in self.planner.scored for name in item.group_names()
                if len(first.get(item.unit.name, ())) != len(second.get(item.unit.name, ()))}

    def meet_both(self, budget: Budget) -> Thresholds:
        """Bisect the mix of gains so that both shares meet their targets."""
        targets = (budget.params, budget.flops)
        low, high, tried = -4., 3., []
        for _ in range(16):
            mix = (low + high) / 2
            _, thresholds = self.approach(0, budget.params, mix, budget.tolerance)
            shares = self.shares(thresholds)
            deviations = [abs(share / target - 1) for share, target in zip(shares, targets)]
            tried.append((max(deviations), shares, thresholds))
            if deviations[1] <= budget.tolerance / 4 and deviations[0] <= budget.tolerance:
                break
            low, high = (low, mix) if shares[1] > budget.flops else (mix, high)
        # Multiples may be far from the targets, but not above
        rounding = self.planner.round_to > 1
        deviation, shares, thresholds = min(
            tried, key=lambda item: (rounding and item[1][1] > budget.flops, item[0]))
        if (shares[1] > budget.flops) if rounding else (deviation > budget.tolerance):
            raise PruningError(f'with {budget.params:.1%} of the parameters, {budget.flops:.1%} of '
                               f'the MACs cannot be reached; the nearest are {shares[0]:.1%} '
                               f'and {shares[1]:.1%}')
        return thresholds


def _mean_costs(scored: Iterable[ScoredUnit], group: LayerGroup,
                cost: CostModel) -> Tuple[float, float]:
    """Mean cost, as shares of the model's, of a channel of the units that touch a group."""
    costs = [(*cost.costs(item.unit), item.unit.size)
             for item in scored if group.name in item.group_names()]
    if not costs:
        raise PruningError(f'layer group {group.name!r} has no prunable layer')
    channels = sum(size for _, _, size in costs)
    params, macs = (sum(item[index] * item[2] for item in costs) / channels for index in (0, 1))
    return params, max(macs, 1e-12)  # what runs only in training has no MACs

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Thresholds that leave a given share of parameters or operations."""
import math
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.analysis import ConvStatistics

from .planner import ScoredSet, Thresholds
from .structures import ChannelSlice, CoupledChannels, LayerGroup, PruningError, PruningPlan
from .surgery import gather_channels


class CostModel:
    """The parameters and operations of a pruned model, computed from its plan.

    Args:
        model (nn.Module): The model before pruning.
        convs (dict[str, ConvStatistics]): See :func:`mmgcp.analysis.record_convs`.
        coupled_sets (Sequence[CoupledChannels]): Its coupled sets.
    """

    def __init__(self, model: nn.Module, convs: Dict[str, ConvStatistics],
                 coupled_sets: Sequence[CoupledChannels]):
        self.convs = convs
        self.coupled_sets = coupled_sets
        self.params = sum(param.numel() for param in model.parameters())
        self.macs = sum(conv.macs for conv in convs.values())
        self.per_channel = {
            name: sum(param.numel() for param in module.parameters()) // module.num_features
            for name, module in model.named_modules() if isinstance(module, _BatchNorm)
        }
        self.biased = {name for name in convs if model.get_submodule(name).bias is not None}

    def __call__(self, removed: Dict[str, Tensor]) -> Tuple[int, int]:
        """Compute parameters and operations that remain.

        Args:
            removed (dict[str, Tensor]): Channels to remove, by name of the set.

        Returns:
            tuple[int, int]: Parameters, and operations for one image.
        """
        counts = {key: len(channels)
                  for key, channels in gather_channels(self.coupled_sets, removed).items()}
        params, macs = self.params, self.macs
        for name, conv in self.convs.items():
            fewer_out, fewer_in = counts.get((name, 'out'), 0), counts.get((name, 'in'), 0)
            weights = ((conv.out_channels - fewer_out) * (conv.in_channels - fewer_in) *
                       conv.kernel_size)
            params -= conv.weights - weights + fewer_out * (name in self.biased)
            macs -= (conv.weights - weights) * conv.positions
        for (name, _), count in counts.items():
            params -= count * self.per_channel.get(name, 0)
        return params, macs

    def costs(self, coupled: CoupledChannels) -> Tuple[float, float]:
        """Parameters and operations, as shares of the model's, that a channel of a set costs."""
        params, macs = 0, 0
        for item in coupled.slices:
            conv = self.convs.get(item.module)
            if conv is None:
                params += self.per_channel.get(item.module, 0) * len(item.channels)
                continue
            weights = len(item.channels) * self._other_side(conv, item) * conv.kernel_size
            params += weights
            macs += weights * conv.positions
        return params / coupled.size / self.params, macs / coupled.size / self.macs

    @staticmethod
    def _other_side(conv: ConvStatistics, item: ChannelSlice) -> int:
        return conv.in_channels if item.side == 'out' else conv.out_channels


def find_thresholds(scored: Sequence[ScoredSet], groups: Sequence[LayerGroup], cost: CostModel,
                    make_plan: Callable[[Thresholds], PruningPlan], fixed: Thresholds,
                    target_params: Optional[float] = None,
                    target_flops: Optional[float] = None,
                    tolerance: float = 0.01) -> Thresholds:
    """Find the thresholds of groups that meet a budget.

    A channel's removal costs about its squared score in accuracy and gains its
    parameters and operations. The thresholds minimise the sum of squared scores
    for what is gained: in group g it is sqrt(x * gain_g), with the mean gain of the
    group's channels and one factor x for all groups, found by bisection. Where both
    shares are asked for, gain_g mixes parameters and operations, and the mix is
    bisected as well.

    Args:
        scored (Sequence[ScoredSet]): The scored sets.
        groups (Sequence[LayerGroup]): The layer groups; those in ``fixed`` stay.
        cost (CostModel): Gives what remains.
        make_plan (Callable): Makes the plan for thresholds.
        fixed (dict[str, float | None]): Thresholds that are not to be searched.
        target_params (float, optional): Share of the parameters to keep.
        target_flops (float, optional): Share of the operations to keep.
        tolerance (float): Accepted relative deviation. Defaults to 0.01.

    Returns:
        dict[str, float | None]: Threshold by name of the group.

    Raises:
        PruningError: The budget cannot be met; says the least that can.
    """
    free = [group for group in groups if group.name not in fixed]
    if not free:
        raise PruningError('every layer group has a ratio or a threshold: nothing is left '
                           'that a budget could decide')
    gains = {group.name: _mean_costs(scored, group, cost) for group in free}
    top = max(float(item.best_scores.max()) for item in scored)

    def thresholds(factor: float, mix: float) -> Thresholds:
        gain = {name: (1 - mix) * params + mix * macs for name, (params, macs) in gains.items()}
        mean = sum(gain.values()) / len(gain)
        return {**fixed, **{name: factor * math.sqrt(gain[name] / mean) for name in gain}}

    def shares(factor: float, mix: float) -> Tuple[float, float]:
        params, macs = cost(make_plan(thresholds(factor, mix)).removed())
        return params / cost.params, macs / cost.macs

    def meet(index: int, target: float, mix: float) -> float:
        """The smallest factor with which the share of params (0) or macs (1) meets the target."""
        low, high = 0., 100 * top
        least = shares(high, mix)[index]
        if least > target * (1 + tolerance):
            what = ('parameters', 'operations')[index]
            raise PruningError(f'{target:.1%} of the {what} cannot be reached: these layer groups '
                               f'and limits leave {least:.1%} at least')
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if shares(middle, mix)[index] <= target else (middle, high)
        return high

    def check(factor: float, mix: float) -> Thresholds:
        """Refuse what is below the target by more than the tolerance, as with equal scores."""
        for index, target in enumerate((target_params, target_flops)):
            share = shares(factor, mix)[index]
            if target is not None and share < target * (1 - tolerance):
                above = shares(factor * (1 - 1e-6), mix)[index]
                raise PruningError(f'{target:.1%} cannot be met within {tolerance:.0%}: many '
                                   'scores are equal, and the nearest shares are '
                                   f'{share:.1%} and {above:.1%}')
        return thresholds(factor, mix)

    if target_params is None:
        return check(meet(1, target_flops, 1.), 1.)
    if target_flops is None:
        return check(meet(0, target_params, 0.), 0.)
    return check(*_meet_both(shares, meet, target_params, target_flops, tolerance))


def _meet_both(shares: Callable, meet: Callable, target_params: float, target_flops: float,
               tolerance: float) -> Tuple[float, float]:
    """Bisect the mix of gains so that both shares meet their targets; gives factor and mix."""
    low, high, tried = 0., 1., []
    for _ in range(14):
        mix = (low + high) / 2
        factor = meet(0, target_params, mix)
        params, macs = shares(factor, mix)
        tried.append((abs(macs / target_flops - 1), factor, mix, macs))
        if macs > target_flops:
            low = mix
        else:
            high = mix
    deviation, factor, mix, macs = min(tried)
    if deviation > tolerance:
        raise PruningError(f'with {target_params:.1%} of the parameters, {target_flops:.1%} of the '
                           f'operations cannot be reached; the nearest is {macs:.1%}')
    return factor, mix


def _mean_costs(scored: Iterable[ScoredSet], group: LayerGroup,
                cost: CostModel) -> Tuple[float, float]:
    """Mean cost of a channel of the sets that touch a group."""
    costs: List[Tuple[float, float]] = []
    for item in scored:
        if group.name in item.group_names():
            costs += [cost.costs(item.coupled)] * item.coupled.size
    if not costs:
        raise PruningError(f'layer group {group.name!r} has no prunable layer')
    return tuple(sum(column) / len(costs) for column in zip(*costs))

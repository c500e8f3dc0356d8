# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Thresholds that leave a given share of the parameters or MACs."""
import math
from dataclasses import dataclass, replace
from typing import Dict, Iterable, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor

from mmgcp.errors import PruningError

from .cost import CostModel
from .merges import MERGES
from .scored import ScoredUnit
from .select import Selection, Thresholds
from .units import LayerGroup

SHARES = ('parameters', 'MACs')


@dataclass
class Budget:
    """What has to remain.

    Attributes:
        params (float, optional): Share of the parameters, in (0, 1].
        flops (float, optional): Share of the MACs, in (0, 1].
        tolerance (float): Accepted relative deviation. Defaults to 0.01.
    """
    params: Optional[float] = None
    flops: Optional[float] = None
    tolerance: float = 0.01

    def __bool__(self) -> bool:
        return self.params is not None or self.flops is not None


def find_thresholds(selection: Selection, groups: Sequence[LayerGroup], cost: CostModel,
                    fixed: Thresholds, budget: Budget,
                    sensitivities: Optional[Dict[str, float]] = None) -> Thresholds:
    """Find the thresholds of groups that meet a budget.

    Removing a channel costs about its squared score in accuracy, times the sensitivity of its
    group, and saves its parameters and MACs. The thresholds minimise the sum of the costs for
    what is saved: in group g it is f * r_g with r_g = sqrt(gain_g / sensitivity_g), the mean
    gain of the group's channels, and one factor f for all groups. Where both shares are asked
    for, gain_g is params_g**(1 + t) * macs_g**(-t), and t is found by bisection.

    Each channel goes from one factor on (see :class:`mmgcp.pruning.merges.MergeRule`). So these
    factors are sorted once, and the place among them is found by bisection.

    Args:
        selection (Selection): Chooses channels by thresholds.
        groups (Sequence[LayerGroup]): The layer groups; those in ``fixed`` stay.
        cost (CostModel): Gives what remains.
        fixed (dict[str, float | None]): Thresholds that are not to be searched.
        budget (Budget): What has to remain.
        sensitivities (dict[str, float], optional): Sensitivities of groups, 1 for those that
            are not in it.

    Returns:
        dict[str, float | None]: Threshold by name of the group.

    Raises:
        PruningError: The budget cannot be met; says the least that can.
    """
    free = [group for group in groups if group.name not in fixed]
    if not free:
        raise PruningError('every layer group has a ratio or a threshold: nothing is left '
                           'that a budget could decide')
    search = _Search(
        gains={group.name: _mean_costs(selection.scored, group, cost) for group in free},
        sensitivities={group.name: (sensitivities or {}).get(group.name, 1.) for group in free},
        fixed=fixed,
        selection=selection,
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
        sensitivities (Dict): Sensitivity of each group.
        fixed (Dict): Thresholds that stay.
        selection (Selection): Chooses the channels.
        cost (CostModel): Gives what remains.
    """
    gains: Dict[str, Tuple[float, float]]
    sensitivities: Dict[str, float]
    fixed: Thresholds
    selection: Selection
    cost: CostModel

    def slopes(self, mix: float) -> Dict[str, float]:
        """The thresholds of the groups for a factor of 1, which is that of the median group."""
        relative = {name: (params**(1 + mix) * macs**-mix / self.sensitivities[name])**0.5
                    for name, (params, macs) in self.gains.items()}
        middle = sorted(relative.values())[len(relative) // 2]
        return {name: value / middle for name, value in relative.items()}

    def thresholds(self, factor: float, mix: float) -> Thresholds:
        """The thresholds for a factor."""
        return {**self.fixed,
                **{name: factor * slope for name, slope in self.slopes(mix).items()}}

    def factors(self, mix: float) -> Tensor:
        """One factor below all from which on channels go, one above, and those in between."""
        slopes = self.slopes(mix)
        fixed = {**self.fixed, **dict.fromkeys(slopes, 0.)}
        found = torch.cat([
            MERGES[self.selection.merge].factors(
                item.all_scores, item.per_layer(fixed, -math.inf), item.per_layer(slopes, 0.))
            for item in self.selection.scored])
        found = found[found.isfinite()].unique()  # sorted
        if not len(found):
            return torch.zeros(1, dtype=torch.double)
        return torch.cat((found[:1] - 1e-6 * (1 + found[:1].abs()), (found[1:] + found[:-1]) / 2,
                          found[-1:] + 1e-6 * (1 + found[-1:].abs())))

    def shares(self, thresholds: Thresholds) -> Tuple[float, float]:
        """What remains of parameters and MACs with thresholds."""
        return self.cost.shares(self.selection.removed(thresholds))

    def meet(self, index: int, target: float, mix: float, tolerance: float) -> Thresholds:
        """Meet the target for the share of parameters (0) or MACs (1) from below."""
        share, thresholds = self.approach(index, target, mix, tolerance)
        if share < target * (1 - tolerance) and self.selection.limits.round_to == 1:
            raise PruningError(f'{target:.1%} of the {SHARES[index]} cannot be met within '
                               f'{tolerance:.0%}: the nearest share below is {share:.1%}')
        return thresholds

    def approach(self, index: int, target: float, mix: float,
                 tolerance: float) -> Tuple[float, Thresholds]:
        """Find the share nearest to a target from below, and its thresholds."""
        factors = self.factors(mix).tolist()

        def share(place: int) -> float:
            return self.shares(self.thresholds(factors[place], mix))[index]

        least = share(-1)
        if least > target * (1 + tolerance):
            raise PruningError(f'{target:.1%} of the {SHARES[index]} cannot be reached: these '
                               f'layer groups and limits leave {least:.1%} at least')
        if least > target:
            return least, self.thresholds(factors[-1], mix)
        low, high = -1, len(factors) - 1  # above the target, and not above it
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) > target else (low, middle)
        reached, below = share(high), self.thresholds(factors[high], mix)
        if reached >= target * (1 - tolerance) or low < 0:
            return reached, below
        return self._around_a_step(index, target, mix, tolerance, reached, below,
                                   self.thresholds(factors[low], mix))

    def _around_a_step(self, index: int, target: float, mix: float, tolerance: float,
                       reached: float, below: Thresholds,
                       above: Thresholds) -> Tuple[float, Thresholds]:
        """Come nearer to a target that one too large step leads past.

        The step is taken and the other groups keep more; or if they cannot keep that much, it is
        left and they keep less.
        """
        tried = [(reached, below)]
        stepping = self._groups_between(below, above)
        rest = {name: gain for name, gain in self.gains.items() if name not in stepping}
        if len(rest) in (0, len(self.gains)):
            return tried[0]
        for side in (below, above):
            fixed = {**self.fixed, **{name: side[name] for name in self.gains if name in stepping}}
            search = replace(self, gains=rest, fixed=fixed)
            factors = search.factors(mix).tolist()
            least, most = (search.shares(search.thresholds(factors[place], mix))[index]
                           for place in (-1, 0))
            if least <= target < most:
                tried.append(search.approach(index, target, mix, tolerance))
                break
            if most <= target:
                tried.append((most, search.thresholds(factors[0], mix)))
        return max(tried, key=lambda item: item[0])

    def _groups_between(self, below: Thresholds, above: Thresholds) -> Set[str]:
        """The groups of the units in which two thresholds choose differently."""
        first, second = self.selection.removed(below), self.selection.removed(above)
        return {name for item in self.selection.scored for name in item.group_names()
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
        rounding = self.selection.limits.round_to > 1
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

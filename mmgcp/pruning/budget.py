# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Thresholds that leave a given share of the parameters or MACs."""
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch

from mmgcp.errors import PruningError, UnreachableError

from .cost import CostModel
from .scored import ScoredUnit
from .select import MERGES, Selection, Thresholds
from .units import LayerGroup

QUANTITIES = ('parameters', 'MACs')


@dataclass
class Budget:
    """Shares of the parameters and of the MACs that remain, in (0, 1].

    In the place of MACs there may be another cost, whose name is the second one of the quantities.
    """
    params: Optional[float] = None
    flops: Optional[float] = None
    tolerance: float = 0.01  # accepted relative deviation
    strict: bool = True  # whether a larger deviation is an error, or the nearest shares will do
    quantities: Tuple[str, str] = QUANTITIES  # what the shares are of

    def on_the_way(self, portion: float) -> 'Budget':
        """Return the budget after a portion, in (0, 1), of the way: the nearest shares will do.

        Equal portions of the way keep the same share of what is left.
        """
        params, flops = (share and share**portion for share in (self.params, self.flops))
        return replace(self, params=params, flops=flops, strict=False)

    def exceeded(self, params: float, flops: float) -> bool:
        """Whether less is left of the parameters or MACs than it asks for."""
        return params < (self.params or 0) or flops < (self.flops or 0)

    def allows(self, params: float, flops: float) -> bool:
        """Whether no more is left of the parameters and MACs than it asks for."""
        return (self.params is None or params <= self.params) and (
            self.flops is None or flops <= self.flops)

    def __bool__(self) -> bool:
        return self.params is not None or self.flops is not None


def find_thresholds(selection: Selection, groups: Sequence[LayerGroup], cost: CostModel,
                    fixed: Thresholds, budget: Budget,
                    sensitivities: Optional[Dict[str, float]] = None,
                    exponent: float = 0.5) -> Thresholds:
    """Find the thresholds of groups that meet a budget; those that are fixed stay.

    Removing a channel costs about its squared score in accuracy, times the sensitivity of its
    group (1 if unknown), and saves its parameters and MACs. The thresholds minimise the sum of
    the costs for what is saved: in group g it is f * r_g with r_g = sqrt(gain_g / sensitivity_g),
    the mean gain of the group's channels, and one factor f for all groups. Where both shares are
    asked for, gain_g is params_g**(1 + t) * macs_g**(-t), and t is found by bisection. The
    exponent of gain_g / sensitivity_g is 0.5, as costs grow with the third power of a threshold
    where scores are spread evenly; it is 1 where they grow with its square.

    Each channel goes from one factor on (see :class:`mmgcp.pruning.select.MergeRule`). So these
    factors are sorted once, and the position among them is found by bisection. Raises a
    PruningError that says what is the least if the budget cannot be met.
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
        cost=cost,
        targets=(budget.params, budget.flops),
        tolerance=budget.tolerance,
        exponent=exponent,
        strict=budget.strict,
        quantities=budget.quantities)
    if budget.params is not None and budget.flops is not None:
        return search.meet_both()
    index = 0 if budget.flops is None else 1
    share, thresholds = search.approach(index, -float(index))
    target = search.targets[index]
    if (share < target * (1 - budget.tolerance) and selection.limits.round_to == 1
            and budget.strict):
        raise PruningError(f'{percent(target)} of the {budget.quantities[index]} cannot be met '
                           f'within {budget.tolerance:.0%}: the nearest share below is '
                           f'{percent(share)}')
    return thresholds


@dataclass
class _Search:
    """A search for thresholds.

    Shares are those of the parameters (index 0) or MACs (1) that remain. The mix t of both gains
    is 0 for parameters alone and -1 for MACs alone.
    """
    gains: Dict[str, Tuple[float, float]]  # mean parameters and MACs of a channel, by group
    sensitivities: Dict[str, float]
    fixed: Thresholds
    selection: Selection
    cost: CostModel
    targets: Tuple[Optional[float], Optional[float]]
    tolerance: float
    exponent: float
    strict: bool
    quantities: Tuple[str, str]

    def slopes(self, mix: float) -> Dict[str, float]:
        """Return the thresholds for a factor of 1, which is that of the median group."""
        relative = {name: (params**(1 + mix) * macs**-mix / self.sensitivities[name])**self.exponent
                    for name, (params, macs) in self.gains.items()}
        middle = sorted(relative.values())[len(relative) // 2]
        return {name: value / middle for name, value in relative.items()}

    def thresholds(self, factor: float, mix: float) -> Thresholds:
        """Return the thresholds for a factor."""
        return {**self.fixed,
                **{name: factor * slope for name, slope in self.slopes(mix).items()}}

    def factors(self, mix: float) -> List[float]:
        """Return a factor below all from which on channels go, one above, and those in between."""
        slopes = self.slopes(mix)
        fixed = {**self.fixed, **dict.fromkeys(slopes, 0.)}
        found = torch.cat([
            MERGES[self.selection.merge].factors(
                item.all_scores, item.per_layer(fixed, -math.inf), item.per_layer(slopes, 0.))
            for item in self.selection.scored])
        found = found[found.isfinite()].unique()  # sorted
        if not len(found):
            return [0.]
        first, last = float(found[0]), float(found[-1])
        return [first - 1e-6 * (1 + abs(first)), *((found[1:] + found[:-1]) / 2).tolist(),
                last + 1e-6 * (1 + abs(last))]

    def shares(self, thresholds: Thresholds) -> Tuple[float, float]:
        """Return what remains of parameters and MACs with thresholds."""
        return self.cost.shares(self.selection.removed(thresholds))

    def approach(self, index: int, mix: float) -> Tuple[float, Thresholds]:
        """Find the share nearest to its target from below, and its thresholds."""
        factors, target, tolerance = self.factors(mix), self.targets[index], self.tolerance

        @lru_cache(None)
        def share(position: int) -> float:
            return self.shares(self.thresholds(factors[position], mix))[index]

        least = share(-1)
        if least > target * (1 + tolerance):
            raise UnreachableError(f'{percent(target)} of the {self.quantities[index]} cannot be '
                                   f'reached: these layer groups and limits leave '
                                   f'{percent(least)} at least')
        if least > target:
            return least, self.thresholds(factors[-1], mix)
        low, high = -1, len(factors) - 1  # above the target, and not above it
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if share(middle) > target else (low, middle)
        reached, below = share(high), self.thresholds(factors[high], mix)
        if reached >= target * (1 - tolerance) or low < 0:
            return reached, below
        around = self._around_a_step(index, mix, below, self.thresholds(factors[low], mix))
        return max([(reached, below), *around], key=lambda item: item[0])

    def _around_a_step(self, index: int, mix: float, below: Thresholds,
                       above: Thresholds) -> List[Tuple[float, Thresholds]]:
        """Find shares nearer to a target that one too large step leads past.

        The step is taken and the other groups keep more; or if they cannot keep that much, it is
        left and they keep less.
        """
        first, second = self.selection.removed(below), self.selection.removed(above)
        stepping = {
            name for item in self.selection.scored for name in item.group_names()
            if len(first.get(item.unit.name, ())) != len(second.get(item.unit.name, ()))}
        rest = {name: gain for name, gain in self.gains.items() if name not in stepping}
        found = []
        for side in (below, above) if 0 < len(rest) < len(self.gains) else ():
            fixed = {**self.fixed, **{name: side[name] for name in self.gains if name in stepping}}
            search = replace(self, gains=rest, fixed=fixed)
            factors = search.factors(mix)
            most_removed, none_removed = (search.thresholds(factors[end], mix) for end in (-1, 0))
            least, most = search.shares(most_removed)[index], search.shares(none_removed)[index]
            if least <= self.targets[index] < most:
                return [*found, search.approach(index, mix)]
            if most <= self.targets[index]:
                found.append((most, none_removed))
        return found

    def meet_both(self) -> Thresholds:
        """Bisect the mix of gains so that both shares meet their targets."""
        params, macs = self.targets
        low, high, tried = -4., 3., []
        for _ in range(16):
            mix = (low + high) / 2
            _, thresholds = self.approach(0, mix)
            shares = self.shares(thresholds)
            deviations = [abs(share / target - 1) for share, target in zip(shares, self.targets)]
            tried.append((max(deviations), shares, thresholds))
            if deviations[1] <= self.tolerance / 4 and deviations[0] <= self.tolerance:
                break
            low, high = (low, mix) if shares[1] > macs else (mix, high)
        # Multiples may be far from the targets, but not above
        rounding = self.selection.limits.round_to > 1
        deviation, shares, thresholds = min(
            tried, key=lambda item: (rounding and item[1][1] > macs, item[0]))
        missed = shares[1] > macs if rounding else deviation > self.tolerance
        if missed and self.strict:
            raise PruningError(f'with {percent(params)} of the parameters, {percent(macs)} of the '
                               f'{self.quantities[1]} cannot be reached; the nearest are '
                               f'{percent(shares[0])} and {percent(shares[1])}')
        return thresholds


def percent(share: float) -> str:
    """Return a share as a percentage; of a small one three digits, as 0.0% would say nothing."""
    return f'{share:.1%}' if share >= 0.01 or not share else f'{100 * share:.3g}%'


def _mean_costs(scored: Iterable[ScoredUnit], group: LayerGroup,
                cost: CostModel) -> Tuple[float, float]:
    """Return the mean cost of a channel of the units with layers in a group, as shares."""
    costs = [(*cost.costs(item.unit), item.unit.size)
             for item in scored if group.name in item.group_names()]
    if not costs:
        raise PruningError(f'layer group {group.name!r} has no prunable layer')
    channels = sum(size for _, _, size in costs)
    params, macs = (sum(item[index] * item[2] for item in costs) / channels for index in (0, 1))
    return params, max(macs, 1e-12)  # what runs only in training has no MACs

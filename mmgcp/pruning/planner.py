# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From scores and thresholds to a pruning plan."""
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer

from .layer_groups import assign_groups
from .merges import MERGES
from .plan import PruningPlan, UnitPlan
from .units import ChannelUnit, LayerGroup

# A channel is kept if its score is above the threshold; None keeps them all.
Thresholds = Dict[str, Optional[float]]


@dataclass(frozen=True)
class ScoredUnit:
    """A channel unit with the scores of its layers.

    Attributes:
        unit (ChannelUnit): The unit, of size C.
        scores (Dict[str, Tensor]): Scores (C, ) by layer, NaN where a layer does not
            have the channel.
        groups (Dict[str, LayerGroup]): Layer group by layer, absent for layers that
            are in none and therefore keep all of their channels.
    """
    unit: ChannelUnit
    scores: Dict[str, Tensor]
    groups: Dict[str, LayerGroup]

    @cached_property
    def rows(self) -> Tensor:
        """All scores (L, C)."""
        return torch.stack(list(self.scores.values()))

    @cached_property
    def best_scores(self) -> Tensor:
        """Best score (C, ) of each channel in any layer."""
        return self.rows.nan_to_num(nan=-math.inf).amax(0)

    @cached_property
    def parts(self) -> List[Tensor]:
        """Channels (K, ) of the layers that have only some of the unit's."""
        parts = {tuple(item.unit_index.unique().tolist()) for item in self.unit.slices}
        return [torch.tensor(part) for part in sorted(parts) if len(part) < self.unit.size]

    def group_names(self) -> List[str]:
        """Names of the groups of the layers that have scores, each once."""
        return list(dict.fromkeys(self.groups[layer].name for layer in self.scores
                                  if layer in self.groups))


def score_units(model: nn.Module, units: Iterable[ChannelUnit], criterion: Callable,
               groups: Sequence[LayerGroup], skipped: Dict[str, str]) -> List[ScoredUnit]:
    """Score channel units and find the layer groups of their layers.

    Channels that only go together share their mean score. Scores that are equal are
    told apart by less than a millionth, at random but always the same, so that any
    number of channels can be chosen by a threshold.

    Args:
        model (nn.Module): The model.
        units (Iterable[ChannelUnit]): The units.
        criterion (Callable): Gives the scores by layer, for model and unit.
        groups (Sequence[LayerGroup]): The layer groups.
        skipped (dict[str, str]): Gets the layers without scores, with the reason.

    Returns:
        list[ScoredUnit]: The units that have scores.
    """
    generator = torch.Generator().manual_seed(0)
    scores = {
        unit.name: {layer: _without_ties(_share(row.double(), unit.norm_groups), unit, generator)
                       for layer, row in criterion(model, unit).items()}
        for unit in units
    }
    members = {unit.name: [item.module for item in unit.side('out')]
               for unit in units}
    owners = assign_groups(model, [name for names in members.values() for name in names], groups)
    scored = []
    for unit in units:
        rows = scores[unit.name]
        if rows:
            groups_of_set = {name: owners[name] for name in members[unit.name]
                             if name in owners}
            if list(rows) == [unit.name] and not set(_makers(model, unit)) <= set(owners):
                groups_of_set.pop(unit.name, None)  # the row speaks for all of the layers
            scored.append(ScoredUnit(unit, rows, groups_of_set))
        else:
            skipped.update(dict.fromkeys(members[unit.name],
                                         f'{type(criterion).__name__} has no scores for it'))
    return scored


def _makers(model: nn.Module, unit: ChannelUnit) -> List[str]:
    """Names of the layers with weights that make the channels of a unit."""
    return [item.module for item in unit.side('out')
            if isinstance(find_layer(model, item.module), WEIGHT_TYPES)]


def thresholds_of_groups(scored: Iterable[ScoredUnit],
                         groups: Iterable[LayerGroup]) -> Thresholds:
    """Find the thresholds of the groups that state a threshold or a ratio.

    A ratio r stands for the value that the share r of the group's scores, over all
    of its layers, does not exceed: the floor(r * K)-th smallest of K.

    Args:
        scored (Iterable[ScoredUnit]): The scored units.
        groups (Iterable[LayerGroup]): The layer groups.

    Returns:
        dict[str, float | None]: Threshold by name of the group.
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


def group_scores(scored: Iterable[ScoredUnit], group: LayerGroup) -> Tensor:
    """Return all scores (K, ) of the layers of a group."""
    rows = [row[~row.isnan()] for item in scored for layer, row in item.scores.items()
            if layer in item.groups and item.groups[layer].name == group.name]
    return torch.cat(rows) if rows else torch.zeros(0)


@dataclass(frozen=True)
class Planner:
    """Chooses the channels that thresholds remove.

    Attributes:
        scored (Sequence[ScoredUnit]): The scored units.
        merge (str): How the layers of a channel unit decide together; see
            :mod:`mmgcp.pruning.merges`.
        min_keep_ratio (float): At least this share of the channels of a unit stays,
            and one; the same holds for a layer that has only some of them.
        round_to (int): The number of channels of a unit that stay is a multiple of it,
            or all of them.
    """
    scored: Sequence[ScoredUnit]
    merge: str = 'or'
    min_keep_ratio: float = 0.01
    round_to: int = 1

    def __post_init__(self):
        if self.merge not in MERGES:
            raise PruningError(f'merge must be one of {sorted(MERGES)}, but is {self.merge!r}')
        if not 0 <= self.min_keep_ratio <= 1:
            raise PruningError(f'min_keep_ratio must be in [0, 1], but is {self.min_keep_ratio}')
        if self.round_to < 1:
            raise PruningError(f'round_to must be a positive number, but is {self.round_to}')

    def choose(self, thresholds: Thresholds) -> Dict[str, Tensor]:
        """Choose the channels to remove.

        Each layer compares its scores with the threshold of its own group, also where
        the layers of a unit belong to different groups; a layer without a threshold
        keeps all of its channels. The verdicts are merged.

        Args:
            thresholds (dict[str, float | None]): Threshold by name of the group.

        Returns:
            dict[str, Tensor]: Ascending indices by name of the unit, where there are any.
        """
        removed = {}
        for item in self.scored:
            channels = self._choose_of_set(item, thresholds)
            if len(channels):
                removed[item.unit.name] = channels
        return removed

    def plan(self, thresholds: Thresholds) -> PruningPlan:
        """Make the plan that thresholds lead to."""
        removed = self.choose(thresholds)
        units = [
            UnitPlan(
                name=item.unit.name,
                layers={piece.module: item.groups[piece.module].name
                        if piece.module in item.groups else ''
                        for piece in item.unit.side('out')},
                size=item.unit.size,
                removed=removed[item.unit.name].tolist() if item.unit.name in removed else [])
            for item in self.scored
        ]
        return PruningPlan(units, thresholds=dict(thresholds))

    def _choose_of_set(self, item: ScoredUnit, thresholds: Thresholds) -> Tensor:
        limits = [thresholds.get(item.groups[layer].name) if layer in item.groups else None
                  for layer in item.scores]
        # A layer without a threshold is infinitely far above it
        limits = torch.tensor([-math.inf if limit is None else limit for limit in limits],
                              dtype=torch.double)
        margins = MERGES[self.merge](item.rows, limits[:, None])
        for part in item.parts:
            margins[part[margins[part].topk(self._minimum(len(part))).indices]] = math.inf
        keep = margins > 0
        if bool(keep.all()):
            return torch.zeros(0, dtype=torch.long)
        minimum = self._minimum(item.unit.size)
        if item.unit.conv_groups is not None:
            keep = self._balanced(item.unit, margins, keep, minimum)
        else:
            keep = self._best(item.unit, margins, keep, minimum)
        return (~keep).nonzero().flatten()

    def _minimum(self, size: int) -> int:
        """How many of so many channels have to stay."""
        return max(1, math.ceil(self.min_keep_ratio * size - 1e-9))

    def _best(self, unit: ChannelUnit, margins: Tensor, keep: Tensor,
              minimum: int) -> Tensor:
        """The mask of the best channels, in whole units."""
        order = margins.sort(descending=True, stable=True).indices
        if unit.norm_groups is None:
            number = max(minimum, int(keep.sum()))
            return unit.mask(order[:math.ceil(number / self.round_to) * self.round_to])
        norm_groups = torch.tensor(list(dict.fromkeys(unit.norm_groups[order].tolist())))
        totals = unit.norm_groups.bincount()[norm_groups].cumsum(0)
        number = max(minimum, int(torch.isin(unit.norm_groups, unit.norm_groups[keep]).sum()))
        enough = (totals >= number) & (totals % self.round_to == 0)
        enough[-1] = True
        return torch.isin(unit.norm_groups, norm_groups[:int(enough.nonzero()[0]) + 1])

    def _balanced(self, unit: ChannelUnit, margins: Tensor, keep: Tensor,
                  minimum: int) -> Tensor:
        """The mask of the best channels, equally many of each block."""
        blocked = (unit.conv_groups >= 0).nonzero().flatten()
        blocked = blocked[unit.conv_groups[blocked].sort(stable=True).indices]
        conv_groups = blocked.view(int(unit.conv_groups.max()) + 1, -1)  # channels by block
        step = self.round_to // math.gcd(self.round_to, len(conv_groups))
        number = max(math.ceil(minimum / len(conv_groups)), int(keep[conv_groups].sum(1).max()))
        number = min(conv_groups.shape[1], math.ceil(number / step) * step)
        best = conv_groups.gather(1, margins[conv_groups].topk(number).indices)
        return unit.mask(best.flatten()) | (keep & (unit.conv_groups < 0))


def _share(row: Tensor, norm_groups: Optional[Tensor]) -> Tensor:
    """Give the channels of each unit their mean score."""
    if norm_groups is None:
        return row
    sums = torch.zeros(int(norm_groups.max()) + 1, dtype=row.dtype)
    counts = sums.index_add(0, norm_groups, (~row.isnan()).to(row))
    means = sums.index_add(0, norm_groups, row.nan_to_num()) / counts
    return torch.where(row.isnan(), row, means[norm_groups])


def _without_ties(row: Tensor, unit: ChannelUnit, generator: torch.Generator) -> Tensor:
    """Lower scores by up to a millionth, equally within a unit."""
    noise = torch.rand(unit.size, generator=generator, dtype=row.dtype)
    if unit.norm_groups is not None:
        noise = noise[unit.norm_groups]
    return row - noise * (1e-6 * row.abs() + 1e-12)

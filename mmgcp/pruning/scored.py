# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Channel units with the scores and the layer groups of their layers."""
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import from_first_rank
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer

from .layer_groups import assign_groups
from .scores import Criterion
from .units import ChannelUnit, LayerGroup


@dataclass(frozen=True)
class ScoredUnit:
    """A channel unit of size C with the scores of its layers."""
    unit: ChannelUnit
    scores: Dict[str, Tensor]  # (C, ) by layer, NaN where a layer does not have the channel
    groups: Dict[str, LayerGroup]  # by layer; layers in none keep all of their channels

    @cached_property
    def all_scores(self) -> Tensor:
        """The scores (L, C) of all L layers."""
        return torch.stack(list(self.scores.values()))

    @cached_property
    def best_scores(self) -> Tensor:
        """Best score (C, ) of each channel in any layer."""
        return self.all_scores.nan_to_num(nan=-math.inf).amax(0)

    def group_names(self) -> List[str]:
        """Return the names of the groups of the layers that have scores, each once."""
        return list(dict.fromkeys(self.groups[layer].name for layer in self.scores
                                  if layer in self.groups))

    def per_layer(self, values: Dict[str, Optional[float]], default: float) -> Tensor:
        """Spread a value of each layer group over the layers that have scores: (L, 1).

        Layers in no group, and those whose group has None or no value, get the default.
        """
        found = [values.get(self.groups[layer].name) if layer in self.groups else None
                 for layer in self.scores]
        return torch.tensor([[default if value is None else value] for value in found],
                            dtype=torch.double)


def score_units(model: nn.Module, units: Sequence[ChannelUnit], criterion: Criterion,
                groups: Sequence[LayerGroup], skipped: Dict[str, str]) -> List[ScoredUnit]:
    """Score channel units and find the layer groups of their layers.

    Channels that only go together share their mean score. Scores that are equal are told apart
    by less than a millionth, at random but always the same, so that any number of channels can
    be chosen by a threshold. Layers without scores are added to the skipped, with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    members = {unit.name: [item.module for item in unit.side('out')] for unit in units}
    owners = assign_groups(model, [name for names in members.values() for name in names], groups)
    found = {unit.name: {layer: values.detach().cpu().double()
                         for layer, values in criterion(model, unit).items()} for unit in units}
    found = {unit.name: _one_for_each_kernel(found[unit.name], unit, owners, criterion)
             for unit in units}
    found = from_first_rank(found)  # those of others may have other rounding errors
    scored = []
    for unit in units:
        _check_scores(found[unit.name], unit, type(criterion).__name__)
        scores = {layer: _without_ties(share_scores(values, unit), unit, generator)
                  for layer, values in found[unit.name].items()}
        if not scores:
            reason = f'{type(criterion).__name__} has no scores for it'
            skipped.update(dict.fromkeys(members[unit.name], reason))
            continue
        groups_of_unit = {name: owners[name] for name in members[unit.name] if name in owners}
        if list(scores) == [unit.name] and any(
                name not in owners and isinstance(find_layer(model, name), WEIGHT_TYPES)
                for name in members[unit.name]):
            groups_of_unit.pop(unit.name, None)  # these scores speak for all producers
        scored.append(ScoredUnit(unit, scores, groups_of_unit))
    return scored


def _one_for_each_kernel(scores: Dict[str, Tensor], unit: ChannelUnit,
                         owners: Dict[str, LayerGroup], criterion: Criterion) -> Dict[str, Tensor]:
    """Join the scores (C, ) of parallel branches, by the name of the first that has any.

    Those in different layer groups stay apart.
    """
    joined = dict(scores)
    for block in unit.branches:
        layers = [name for name in block if name in scores]
        if len(layers) > 1 and len({owners.get(name) for name in layers}) == 1:
            together = torch.stack([joined.pop(name) for name in layers])
            joined[layers[0]] = criterion.join_branches(together)
    return {name: joined[name] for name in scores if name in joined}  # in the old order


def group_scores(scored: Iterable[ScoredUnit], group: LayerGroup) -> Tensor:
    """Return all scores (K, ) of the layers of a group."""
    found = [scores[~scores.isnan()] for item in scored for layer, scores in item.scores.items()
             if layer in item.groups and item.groups[layer].name == group.name]
    return torch.cat(found) if found else torch.zeros(0)


def share_scores(scores: Tensor, unit: ChannelUnit) -> Tensor:
    """Give the channels of a unit (C, ) that only go together their mean score."""
    if unit.norm_groups is None:
        return scores
    sums = torch.zeros(int(unit.norm_groups.max()) + 1, dtype=scores.dtype)
    counts = sums.index_add(0, unit.norm_groups, (~scores.isnan()).to(scores))
    means = sums.index_add(0, unit.norm_groups, scores.nan_to_num()) / counts
    return torch.where(scores.isnan(), scores, means[unit.norm_groups])


def _check_scores(found: Dict[str, Tensor], unit: ChannelUnit, criterion: str) -> None:
    """Raise a PruningError if scores (C, ) by layer are infinite, or NaN where it has channels."""
    for layer, values in found.items():
        wrong = values.isinf()
        for item in unit.slices:
            if item.module == layer and layer != unit.name:
                wrong[item.unit_index] |= values[item.unit_index].isnan()
        if bool(wrong.any()):
            number = int(wrong.nonzero()[0])
            raise PruningError(f'{criterion} gives channel {number} of {layer} the score '
                               f'{float(values[number])}; are the weights those of a trained '
                               'detector?')


def _without_ties(scores: Tensor, unit: ChannelUnit, generator: torch.Generator) -> Tensor:
    """Lower scores by up to a millionth, equally for channels that only go together."""
    noise = torch.rand(unit.size, generator=generator, dtype=scores.dtype)
    if unit.norm_groups is not None:
        noise = noise[unit.norm_groups]
    return scores - noise * (1e-6 * scores.abs() + 1e-12)

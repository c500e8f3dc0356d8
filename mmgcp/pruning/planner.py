# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From scores and thresholds to a pruning plan."""
import math
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from .layer_groups import assign_groups
from .structures import CoupledChannels, LayerGroup, PruningError, PruningPlan, SetPlan

# A channel is kept if its score is above the threshold; None keeps them all.
Thresholds = Dict[str, Optional[float]]


@dataclass(frozen=True)
class ScoredSet:
    """A coupled set with the scores of its layers.

    Attributes:
        coupled (CoupledChannels): The set, of size C.
        scores (Dict[str, Tensor]): Scores (C, ) by layer, NaN where a layer does not
            have the channel.
        groups (Dict[str, LayerGroup]): Layer group by layer, absent for layers that
            are in none and therefore keep all of their channels.
    """
    coupled: CoupledChannels
    scores: Dict[str, Tensor]
    groups: Dict[str, LayerGroup]

    @property
    def best_scores(self) -> Tensor:
        """Best score (C, ) of each channel in any layer."""
        return torch.stack([row.nan_to_num(nan=-math.inf) for row in self.scores.values()]).amax(0)

    def group_names(self) -> List[str]:
        """Names of the groups of the set's layers, each once."""
        return list(dict.fromkeys(group.name for group in self.groups.values()))


def score_sets(model: nn.Module, coupled_sets: Iterable[CoupledChannels], criterion: Callable,
               groups: Sequence[LayerGroup], skipped: Dict[str, str]) -> List[ScoredSet]:
    """Score coupled sets and find the layer groups of their layers.

    Args:
        model (nn.Module): The model.
        coupled_sets (Iterable[CoupledChannels]): The sets.
        criterion (Callable): Gives the scores by layer, for model and set.
        groups (Sequence[LayerGroup]): The layer groups.
        skipped (dict[str, str]): Gets the layers without scores, with the reason.

    Returns:
        list[ScoredSet]: The sets that have scores.
    """
    scores = {coupled.name: criterion(model, coupled) for coupled in coupled_sets}
    owners = assign_groups(model, [layer for rows in scores.values() for layer in rows], groups)
    scored = []
    for coupled in coupled_sets:
        rows = scores[coupled.name]
        if rows:
            scored.append(ScoredSet(coupled, rows, {x: owners[x] for x in rows if x in owners}))
        else:
            skipped.update({item.module: f'{type(criterion).__name__} has no scores for it'
                            for item in coupled.side('out')})
    return scored


def thresholds_of_groups(scored: Iterable[ScoredSet],
                         groups: Iterable[LayerGroup]) -> Thresholds:
    """Find the thresholds of the groups that state a threshold or a ratio.

    A ratio r stands for the value that the share r of the group's scores, over all
    of its layers, does not exceed: the floor(r * K)-th smallest of K.

    Args:
        scored (Iterable[ScoredSet]): The scored sets.
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
            number = int(len(values) * group.ratio + 1e-9)
            thresholds[group.name] = float(values[number - 1]) if number else None
    return thresholds


def group_scores(scored: Iterable[ScoredSet], group: LayerGroup) -> Tensor:
    """Return all scores (K, ) of the layers of a group."""
    rows = [row[~row.isnan()] for item in scored for layer, row in item.scores.items()
            if item.groups.get(layer) is group]
    return torch.cat(rows) if rows else torch.zeros(0)


def choose_channels(item: ScoredSet, thresholds: Thresholds, merge: str,
                    min_keep_ratio: float) -> Tensor:
    """Choose the channels of a set to remove.

    Each layer compares its scores with the threshold of its own group, also where
    the layers of the set belong to different groups; a layer without a threshold
    keeps all of its channels. The verdicts are merged: with
    ``'or'`` (the paper's rule) a channel stays if any layer keeps it, with
    ``'majority'`` (the rule in the authors' code) if more than half of them do.

    Args:
        item (ScoredSet): The set, of size C.
        thresholds (dict[str, float | None]): Threshold by name of the group.
        merge (str): ``'or'`` or ``'majority'``.
        min_keep_ratio (float): At least this share of the channels stays, and one.

    Returns:
        Tensor: Indices of the channels to remove, ascending.
    """
    if merge not in ('or', 'majority'):
        raise PruningError(f"merge must be 'or' or 'majority', but is {merge!r}")
    limits = [thresholds.get(item.groups[layer].name) if layer in item.groups else None
              for layer in item.scores]
    rows = torch.stack(list(item.scores.values()))
    present = ~rows.isnan()
    protected = present & torch.tensor([[limit is None] for limit in limits])
    above = present & (rows.nan_to_num() > torch.tensor([[limit or 0.] for limit in limits]))
    votes, voters = above.sum(0), present.sum(0)
    keep = protected.any(0) | (votes > 0 if merge == 'or' else 2 * votes > voters)
    minimum = max(1, math.ceil(min_keep_ratio * item.coupled.size))
    if int(keep.sum()) < minimum:
        keep[item.best_scores.topk(minimum).indices] = True
    return (~keep).nonzero().flatten()


def make_plan(scored: Sequence[ScoredSet], thresholds: Thresholds, merge: str = 'or',
              min_keep_ratio: float = 0.01) -> PruningPlan:
    """Make the plan that given thresholds lead to.

    Args:
        scored (Sequence[ScoredSet]): The scored sets.
        thresholds (dict[str, float | None]): Threshold by name of the group.
        merge (str): See :func:`choose_channels`. Defaults to 'or'.
        min_keep_ratio (float): See :func:`choose_channels`. Defaults to 0.01.

    Returns:
        PruningPlan: The plan.
    """
    sets = [
        SetPlan(
            name=item.coupled.name,
            groups=item.group_names(),
            layers=[piece.module for piece in item.coupled.side('out')],
            size=item.coupled.size,
            removed=choose_channels(item, thresholds, merge, min_keep_ratio).tolist())
        for item in scored
    ]
    return PruningPlan(sets, thresholds=dict(thresholds))

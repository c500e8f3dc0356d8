# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How many channels each channel unit loses: by one threshold a group, or the same share."""
from dataclasses import replace
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.registry import TASK_UTILS

from .layerwise import LayerwiseCriterion
from .merges import MERGES
from .planner import ScoredUnit
from .scores import Criterion
from .units import ChannelUnit, LayerGroup

ALLOCATIONS = (None, 'global', 'uniform')


class EqualShares(Criterion):
    """Scores that are ranks, so that units lose the same share of their channels.

    Which channels are lowest means nothing: it says how many go, not which.
    """

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return the ranks (C, ) for each layer with weights, NaN where it has no channel."""
        order = torch.arange(unit.size) if unit.norm_groups is None else unit.norm_groups
        ranks = share_ranks(unit, order)
        return {item.module: torch.full_like(ranks, float('nan')).index_copy(
                    0, item.unit_index.unique(), ranks[item.unit_index.unique()])
                for item in unit.side('out')
                if isinstance(find_layer(model, item.module), WEIGHT_TYPES)}


def share_ranks(unit: ChannelUnit, scores: Tensor) -> Tensor:
    """Return the ranks of the channels of a unit.

    Channels that are not alike (in another block, or in other layers of the unit) are ranked
    apart, so that a threshold removes the same share of each kind.

    Args:
        unit (ChannelUnit): The unit, of size C.
        scores (Tensor): Scores (C, ), equal within a unit of the unit.

    Returns:
        Tensor: Ranks (C, ). The i-th lowest of n alike channels has the rank (i + 0.5) / n, so
        that a threshold t removes t * n of them, rounded.
    """
    kinds = torch.stack(_memberships(unit)).unique(dim=1, return_inverse=True)[1]
    ranks = torch.zeros(unit.size, dtype=torch.double)
    for kind in kinds.unique():
        alike = (kinds == kind).nonzero().flatten()
        alike = alike[scores[alike].sort(stable=True).indices]
        ranks[alike] = (torch.arange(len(alike)).double() + 0.5) / len(alike)
    return ranks


def _memberships(unit: ChannelUnit) -> List[Tensor]:
    """Numbers (C, ) that are the same for channels that are alike."""
    conv_groups = torch.zeros(unit.size, dtype=torch.long)
    return [conv_groups if unit.conv_groups is None else unit.conv_groups,
            *(unit.mask(item.unit_index).long() for item in unit.slices)]


def rank_units(scored: Sequence[ScoredUnit], merge: str) -> List[ScoredUnit]:
    """Put ranks in the place of scores, so that units lose the same share of their channels.

    Args:
        scored (Sequence[ScoredUnit]): The scored units.
        merge (str): How the scores of the layers of a unit become one score a channel: with 'or'
            it is the highest; see :mod:`mmgcp.pruning.merges`.

    Returns:
        list[ScoredUnit]: The units. All layers of one have the same ranks, see
        :func:`share_ranks`, NaN where they had no score.
    """
    ranked = []
    for item in scored:
        merged = MERGES[merge](item.rows, item.rows.new_zeros(len(item.rows), 1))
        ranks = share_ranks(item.unit, merged)
        ranked.append(replace(item, scores={
            layer: ranks.masked_fill(row.isnan(), float('nan'))
            for layer, row in item.scores.items()}))
    return ranked


def check_allocation(allocation: Optional[str], criterion: Criterion) -> bool:
    """Check how many channels each unit is to lose.

    Args:
        allocation (str, optional): See :func:`mmgcp.pruning.prune`.
        criterion (Criterion): The criterion.

    Returns:
        bool: Whether all units of a group lose the same share.

    Raises:
        PruningError: There is no such allocation, or the criterion has another one.
    """
    if allocation not in ALLOCATIONS:
        raise PruningError(f'allocation must be one of {ALLOCATIONS}, but is {allocation!r}')
    own = criterion.default_allocation
    if isinstance(criterion, LayerwiseCriterion) and allocation not in (None, own):
        raise PruningError(
            f'allocation is {allocation!r}, but {type(criterion).__name__} goes layer by layer: '
            "it is 'uniform' there, unless the criterion's option allocation_criterion "
            'names another criterion that decides how many channels go')
    return (allocation or own) == 'uniform'


def ratios_as_shares(groups: Sequence[LayerGroup]) -> List[LayerGroup]:
    """Let the ratios of groups hold for each unit, not only for all of them together."""
    return [group if group.ratio is None
            else replace(group, ratio=None, threshold=float(group.ratio)) for group in groups]


def allocation_scorer(criterion: LayerwiseCriterion) -> Criterion:
    """Return the criterion whose scores decide how many channels each unit loses.

    Args:
        criterion (LayerwiseCriterion): The criterion that then decides which.

    Returns:
        Criterion: That of its option, or :class:`EqualShares`.

    Raises:
        PruningError: The one of its option goes layer by layer itself.
    """
    if criterion.allocation_criterion is None:
        return EqualShares()
    scorer = TASK_UTILS.build(criterion.allocation_criterion)
    if isinstance(scorer, LayerwiseCriterion):
        raise PruningError(f'allocation_criterion must be one that scores all units at once, but '
                           f'{type(scorer).__name__} goes layer by layer')
    return scorer

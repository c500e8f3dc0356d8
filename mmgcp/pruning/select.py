# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which channels of a unit are removed: the lowest, as many as its limits allow.

Each layer votes on a channel by comparing its score with a threshold. A :class:`MergeRule` turns
the votes into one margin a channel, which stays if that is above zero or limits ask for it.
"""
import math
from dataclasses import dataclass, field
from typing import Callable, Dict, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from mmgcp.errors import PruningError

from .scored import ScoredUnit, share_scores
from .units import ChannelUnit

# A channel is kept if its score is above the threshold; None keeps them all.
Thresholds = Dict[str, Optional[float]]


class MergeRule(NamedTuple):
    """A rule by which L layers decide on C channels.

    The scores (L, C) are NaN where a layer does not have a channel. Thresholds (L, 1) are -inf
    for layers that keep all of their channels.
    """
    merge: Callable[[Tensor], Tensor]  # from (L, C), NaN where a layer has no say, to (C, )
    votes: bool  # each layer compares its own scores, or the merged scores are compared once

    def margins(self, scores: Tensor, thresholds: Tensor) -> Tensor:
        """Return margins (C, ): a channel stays if it is above zero; higher ones are worth more."""
        if self.votes:
            values = self.merge(scores - thresholds)
        else:
            values = self.merge(scores) - _mean_where(scores, thresholds)
        return _protected(values, scores, thresholds)

    def factors(self, scores: Tensor, fixed: Tensor, slopes: Tensor) -> Tensor:
        """Return the least f (C, ) with which thresholds ``fixed + f * slopes`` remove a channel.

        The slopes are (L, 1). It is -inf if each f removes the channel, inf if none does.
        """
        if self.votes:
            values = self.merge(_quotients(scores - fixed, slopes))
        else:
            values = _quotients(self.merge(scores) - _mean_where(scores, fixed),
                                _mean_where(scores, slopes))
        return _protected(values, scores, fixed)


def _without_nan(values: Tensor) -> Tensor:
    return values.masked_fill(values.isnan(), -math.inf)


def _decisive(values: Tensor) -> Tensor:
    """Return the value that more than half of the layers reach if it is large enough."""
    needed = (~values.isnan()).sum(0) // 2
    ordered = _without_nan(values).sort(0, descending=True).values
    return ordered.gather(0, needed[None].clamp(max=len(values) - 1))[0]


def _mean_where(scores: Tensor, values: Tensor) -> Tensor:
    """Return the mean (C, ) of one value (L, 1) a layer over the layers that have a channel."""
    return torch.where(scores.isnan(), scores, values.expand_as(scores)).nanmean(0)


def _protected(values: Tensor, scores: Tensor, thresholds: Tensor) -> Tensor:
    """Keep what a layer without a threshold has, and what no layer has a score for."""
    present = ~scores.isnan()
    safe = (present & thresholds.isneginf()).any(0) | ~present.any(0)
    return values.masked_fill(safe, math.inf)


def _quotients(distances: Tensor, slopes: Tensor) -> Tensor:
    """Return the factors from which on ``distances <= factor * slopes``."""
    always = torch.where(distances <= 0, -math.inf, math.inf).to(distances)
    quotients = torch.where(slopes > 0, distances / slopes, always)
    return torch.where(distances.isnan(), distances, quotients)


MERGES: Dict[str, MergeRule] = {
    # Stays if any layer keeps it: GCP-SAD, arXiv 2306.01526
    'or': MergeRule(lambda values: _without_nan(values).amax(0), votes=True),
    # Stays if more than half of the layers keep it: the code of GCP-SAD's authors
    'majority': MergeRule(_decisive, votes=True),
    # Stays if its mean score, or their sum, is above the layers' mean threshold
    'mean': MergeRule(lambda scores: scores.nanmean(0), votes=False),
    'sum': MergeRule(lambda scores: scores.nansum(0), votes=False),
}


@dataclass(frozen=True)
class Limits:
    """How many channels have to stay.

    At least a share of the channels of a unit stays, and one; the same holds for a layer that
    has only some of them. How many stay, of the unit and of what such layers have, is a multiple
    of ``round_to``, or all of them.
    """
    min_keep_ratio: float = 0.01
    round_to: int = 1

    def least(self, size: int) -> int:
        """Return how many of so many channels have to stay."""
        return max(1, math.ceil(self.min_keep_ratio * size - 1e-9))


@dataclass(frozen=True)
class Selection:
    """Chooses the channels that thresholds remove, beside those (K, ) that are gone already."""
    scored: Sequence[ScoredUnit]
    merge: str = 'or'
    limits: Limits = Limits()
    gone: Dict[str, Tensor] = field(default_factory=dict)  # by name of the unit

    def removed(self, thresholds: Thresholds) -> Dict[str, Tensor]:
        """Return the channels (K, ) to remove, ascending, by name of the unit if there are any.

        Each layer compares its scores with the threshold of its own group, also where the
        layers of a unit belong to different groups; a layer without a threshold keeps all of
        its channels. The votes are merged.
        """
        removed = dict(self.gone)
        for item in self.scored:
            margins = MERGES[self.merge].margins(
                item.all_scores, item.per_layer(thresholds, -math.inf))
            if item.unit.name in self.gone:
                margins[self.gone[item.unit.name]] = -math.inf
            channels = select(item.unit, margins, self.limits)
            if len(channels):
                removed[item.unit.name] = channels
        return removed


def select(unit: ChannelUnit, margins: Tensor, limits: Limits) -> Tensor:
    """Return the channels (K, ) of a unit to remove, ascending.

    Those with a margin (C, ) of at most zero go, the lowest first, as far as the limits allow.
    """
    if bool((margins > 0).all()):
        return torch.zeros(0, dtype=torch.long)
    margins = _protect(unit, margins, limits)
    keep = margins > 0
    if unit.conv_groups is not None:
        keep = _keep_equally_many(unit, margins, keep, limits)
    elif unit.norm_groups is not None:
        keep = _keep_whole_groups(unit, margins, keep, limits)
    else:
        number = max(limits.least(unit.size), int(keep.sum()))
        keep = unit.mask(margins.sort(descending=True, stable=True).indices[:number])
        keep = _round_up(unit.portions, margins, keep, limits)
    return (~keep).nonzero().flatten()


def select_lowest(unit: ChannelUnit, scores: Tensor, like: Tensor, limits: Limits) -> Tensor:
    """Return the channels (K, ) of a unit with the lowest scores (C, ), as many as in ``like``.

    This is another choice within the limits; of each group of a grouped convolution as many go
    as in it. Fewer go only where channels that go together, or the limits of layers that have
    only some of the channels, forbid it. Channels with NaN stay.
    """
    if scores.shape != (unit.size, ):
        raise PruningError(f'the unit {unit.name!r} has {unit.size} channels, but got scores '
                           f'of shape {tuple(scores.shape)}')
    scores = share_scores(scores.detach().cpu().double(), unit)
    ranking = _protect(unit, scores.nan_to_num(nan=math.inf, posinf=math.inf), limits)
    others = unit.mask(like)
    groups = torch.zeros(unit.size) if unit.conv_groups is None else unit.conv_groups
    margins = torch.full_like(ranking, math.inf)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        number = int(others[members].sum())
        order = members[ranking[members].argsort(stable=True)]
        margins[order] = torch.arange(len(order)).to(ranking) - number + 0.5
    return select(unit, margins.masked_fill(ranking.isinf(), math.inf), limits)


def _protect(unit: ChannelUnit, margins: Tensor, limits: Limits) -> Tensor:
    """Raise the margins (C, ) of the best channels of layers that have only some to infinity."""
    margins = margins.clone()
    for part in unit.parts:
        best = margins[part].topk(limits.least(len(part))).indices
        margins[part[best]] = math.inf
    return margins


def _round_up(portions: Sequence[Tensor], margins: Tensor, keep: Tensor,
              limits: Limits) -> Tensor:
    """Add the best channels to a mask (C, ) of those that stay, up to multiples in each portion.

    A layer has whole portions, and thus multiples on each side as well.
    """
    kept = keep.clone()
    for portion in portions:
        best = portion[margins[portion].argsort(descending=True, stable=True)]
        number = math.ceil(int(keep[portion].sum()) / limits.round_to) * limits.round_to
        kept[best[:number]] = True
    return kept


def _keep_whole_groups(unit: ChannelUnit, margins: Tensor, keep: Tensor,
                       limits: Limits) -> Tensor:
    """Return the mask (C, ) of the best channels, in whole groups of a GroupNorm."""
    order = margins.sort(descending=True, stable=True).indices
    groups = torch.tensor(list(dict.fromkeys(unit.norm_groups[order].tolist())))
    totals = unit.norm_groups.bincount()[groups].cumsum(0)
    number = int(torch.isin(unit.norm_groups, unit.norm_groups[keep]).sum())
    number = max(limits.least(unit.size), number)
    enough = totals >= number
    for portion in unit.portions:
        left = unit.norm_groups[portion].bincount(minlength=len(groups))[groups].cumsum(0)
        enough &= (left % limits.round_to == 0) | (left == left[-1])
    enough[-1] = True
    return torch.isin(unit.norm_groups, groups[:int(enough.nonzero()[0]) + 1])


def _keep_equally_many(unit: ChannelUnit, margins: Tensor, keep: Tensor,
                       limits: Limits) -> Tensor:
    """Return the mask (C, ) of the best channels, equally many of each group of a convolution."""
    grouped = (unit.conv_groups >= 0).nonzero().flatten()
    grouped = grouped[unit.conv_groups[grouped].sort(stable=True).indices]
    groups = grouped.view(int(unit.conv_groups.max()) + 1, -1)  # channels by group
    step = limits.round_to // math.gcd(limits.round_to, len(groups))
    number = max(math.ceil(limits.least(unit.size) / len(groups)), int(keep[groups].sum(1).max()))
    number = min(groups.shape[1], math.ceil(number / step) * step)
    best = groups.gather(1, margins[groups].topk(number).indices)
    others = unit.conv_groups < 0
    portions = [portion[others[portion]] for portion in unit.portions]
    return unit.mask(best.flatten()) | _round_up(portions, margins, keep & others, limits)

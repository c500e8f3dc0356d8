# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How the layers of a channel unit decide together which of its channels stay.

Each layer votes on a channel by comparing its score with a threshold. A :class:`MergeRule` turns
the votes into one margin a channel, which stays if that is above zero.
"""
import math
from typing import Callable, Dict, NamedTuple

import torch
from torch import Tensor


class MergeRule(NamedTuple):
    """A rule by which L layers decide on C channels.

    The scores (L, C) are NaN where a layer does not have a channel. Thresholds (L, 1) are -inf
    for layers that keep all of their channels.
    """
    merge: Callable[[Tensor], Tensor]  # from (L, C), NaN where a layer has no say, to (C, )
    votes: bool  # each layer compares its own scores, or the merged scores are compared once

    def margins(self, scores: Tensor, thresholds: Tensor) -> Tensor:
        """Return margins (C, ): channels above zero stay, and those further up are worth more."""
        if self.votes:
            values = self.merge(scores - thresholds)
        else:
            values = self.merge(scores) - _mean_where(scores, thresholds)
        return _protected(values, scores, thresholds)

    def factors(self, scores: Tensor, fixed: Tensor, slopes: Tensor) -> Tensor:
        """Return from which factor f (C, ) on thresholds ``fixed + f * slopes`` remove a channel.

        The slopes have the shape (L, 1). The factor is -inf if any removes it, inf if none does.
        """
        if self.votes:
            values = self.merge(_quotients(scores - fixed, slopes))
        else:
            values = _quotients(self.merge(scores) - _mean_where(scores, fixed),
                                _mean_where(scores, slopes))
        return _protected(values, scores, fixed)


def _largest(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(0)


def _decisive(values: Tensor) -> Tensor:
    """Return the value that more than half of the layers reach if it is large enough."""
    needed = (~values.isnan()).sum(0) // 2
    ordered = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort(
        0, descending=True).values
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
    'or': MergeRule(_largest, votes=True),
    # Stays if more than half of the layers keep it: the code of GCP-SAD's authors
    'majority': MergeRule(_decisive, votes=True),
    # Stays if its mean score, or their sum, is above the layers' mean threshold
    'mean': MergeRule(lambda scores: scores.nanmean(0), votes=False),
    'sum': MergeRule(lambda scores: scores.nansum(0), votes=False),
}

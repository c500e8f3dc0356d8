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
    """A rule by which layers decide together.

    In both functions ``scores`` (L, C) are those of L layers, NaN where a layer does not have a
    channel.

    Attributes:
        margins (Callable): Takes scores and thresholds (L, 1), -inf for layers that keep all of
            their channels. Returns margins (C, ): channels with a margin above zero stay, and of
            two channels the one with the higher margin is more worth keeping.
        factors (Callable): Takes scores, fixed thresholds (L, 1) and slopes (L, 1). Returns the
            least factor f (C, ) with which ``fixed + f * slopes`` as thresholds removes a
            channel: -inf if any does, inf if none does.
    """
    margins: Callable[[Tensor, Tensor], Tensor]
    factors: Callable[[Tensor, Tensor, Tensor], Tensor]


def _largest(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).amax(0)


def _decisive(values: Tensor) -> Tensor:
    """The value that more than half of the layers reach if it is large enough."""
    needed = (~values.isnan()).sum(0) // 2
    ordered = values.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).sort(
        0, descending=True).values
    return ordered.gather(0, needed[None].clamp(max=len(values) - 1))[0]


def _mean(values: Tensor) -> Tensor:
    return values.nanmean(0)


def _mean_where(scores: Tensor, values: Tensor) -> Tensor:
    """The mean over the layers that have a channel of one value (L, 1) a layer."""
    return torch.where(scores.isnan(), scores, values.expand_as(scores)).nanmean(0)


def _protected(values: Tensor, scores: Tensor, thresholds: Tensor) -> Tensor:
    """Let stay what a layer without a threshold has, and what no layer has a score for."""
    present = ~scores.isnan()
    safe = (present & thresholds.isneginf()).any(0) | ~present.any(0)
    return values.masked_fill(safe, math.inf)


def _quotients(distances: Tensor, slopes: Tensor) -> Tensor:
    """The factors from which on ``distances <= factor * slopes``."""
    always = torch.where(distances <= 0, -math.inf, math.inf).to(distances)
    quotients = torch.where(slopes > 0, distances / slopes, always)
    return torch.where(distances.isnan(), distances, quotients)


def _each_votes(merge: Callable[[Tensor], Tensor]) -> MergeRule:
    """A rule that merges what each layer says by itself."""
    def margins(scores: Tensor, thresholds: Tensor) -> Tensor:
        return _protected(merge(scores - thresholds), scores, thresholds)

    def factors(scores: Tensor, fixed: Tensor, slopes: Tensor) -> Tensor:
        return _protected(merge(_quotients(scores - fixed, slopes)), scores, fixed)

    return MergeRule(margins, factors)


def _together(merge: Callable[[Tensor], Tensor]) -> MergeRule:
    """A rule that compares merged scores with the layers' mean threshold."""
    def margins(scores: Tensor, thresholds: Tensor) -> Tensor:
        limits = _mean_where(scores, thresholds)
        return _protected(merge(scores) - limits, scores, thresholds)

    def factors(scores: Tensor, fixed: Tensor, slopes: Tensor) -> Tensor:
        distances = merge(scores) - _mean_where(scores, fixed)
        return _protected(_quotients(distances, _mean_where(scores, slopes)), scores, fixed)

    return MergeRule(margins, factors)


MERGES: Dict[str, MergeRule] = {
    # Stays if any layer keeps it: GCP-SAD, arXiv 2306.01526
    'or': _each_votes(_largest),
    # Stays if more than half of the layers keep it: the code of GCP-SAD's authors
    'majority': _each_votes(_decisive),
    # Stays if its mean score, or their sum, is above the layers' mean threshold
    'mean': _together(_mean),
    'sum': _together(lambda scores: scores.nansum(0)),
}

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How the layers of a channel unit decide together which of its channels stay.

Each function takes scores (L, C) of L layers, NaN where a layer does not have a channel,
and thresholds (L, 1), -inf for layers that keep everything. It returns margins (C, ): a
channel stays if its margin is above zero, and the higher the margin, the rather.
"""
import math
from typing import Callable, Dict

import torch
from torch import Tensor


def merge_or(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Keep what any layer keeps (GCP-SAD, arXiv 2306.01526)."""
    return _protected((scores - thresholds).nan_to_num(nan=-math.inf, posinf=math.inf).amax(0),
                      scores, thresholds)


def merge_majority(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Keep what more than half of the layers keep (the authors' code)."""
    margins = (scores - thresholds).nan_to_num(nan=-math.inf, posinf=math.inf)
    needed = (~scores.isnan()).sum(0) // 2
    ordered = margins.sort(0, descending=True).values
    return _protected(ordered.gather(0, needed[None].clamp(max=len(scores) - 1))[0],
                      scores, thresholds)


def merge_mean(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Keep what has a mean score above the layers' mean threshold."""
    return _protected((scores - thresholds).nanmean(0), scores, thresholds)


def merge_sum(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Keep what has a sum of scores above the layers' mean threshold."""
    limits = torch.where(scores.isnan(), scores, thresholds.expand_as(scores)).nanmean(0)
    return _protected(scores.nansum(0) - limits, scores, thresholds)


def _protected(margins: Tensor, scores: Tensor, thresholds: Tensor) -> Tensor:
    """Keep what a layer without a threshold has, and what no layer has a score for."""
    present = ~scores.isnan()
    safe = (present & thresholds.isneginf()).any(0) | ~present.any(0)
    return margins.masked_fill(safe, math.inf)


MERGES: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'or': merge_or, 'mean': merge_mean, 'majority': merge_majority, 'sum': merge_sum
}

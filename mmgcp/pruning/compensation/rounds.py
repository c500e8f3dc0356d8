# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Rounds: images that run together, in portions whose memory is limited."""
from dataclasses import dataclass, field
from itertools import count
from typing import Iterable, Iterator, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmgcp.nn.distributed import from_first_rank, numbered, total_over_ranks
from mmgcp.nn.sampling import DrawnPlaces

# Places of an image that each layer is fitted at
PLACES = 256
# Images run together, if they have so many pixels in all at most: memory grows with it
ROUND_IMAGES, ROUND_PIXELS = 16, 16 * 416**2


@dataclass
class Round:
    """Images that run together."""
    numbers: List[int]  # of the images, among those of all ranks
    images: Optional[Tensor]  # (N, C, H, W); None where only other ranks have some
    choose: DrawnPlaces = field(init=False)  # where layers are fitted

    def __post_init__(self):
        self.choose = DrawnPlaces(self.numbers, PLACES)


def make_rounds(batches: Iterable[Tensor]) -> Iterator[Round]:
    """Join batches (N, C, H, W), of which each rank has its own, to the rounds of all ranks.

    All have the same number of rounds. Smaller images of a round are padded with zeros.
    """
    portions = numbered(batches)
    waiting = next(portions, None)
    size = width = 1
    if waiting is not None:
        width = len(waiting[1])
        size = max(1, min(ROUND_IMAGES, ROUND_PIXELS // waiting[1][0, 0].numel()) // width)
    size, width = from_first_rank((size, width))
    for end in count(size, size):
        if not total_over_ranks(waiting is not None):
            return
        numbers, joined = [], []
        while waiting is not None and waiting[0] < end:
            number, batch = waiting
            numbers += range(number * width, number * width + len(batch))
            joined.append(batch)
            waiting = next(portions, None)
        yield Round(numbers, _join(joined) if joined else None)


def _join(batches: Sequence[Tensor]) -> Tensor:
    """Join batches (N, C, H, W), padded at the bottom and right to the largest."""
    height, width = (max(batch.shape[dim] for batch in batches) for dim in (2, 3))
    return torch.cat([F.pad(batch, (0, width - batch.shape[3], 0, height - batch.shape[2]))
                      for batch in batches])

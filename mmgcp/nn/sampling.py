# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Sampling what layers read and emit at some places of their feature maps."""
from typing import Dict, Iterator, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Places(NamedTuple):
    """S places in feature maps: index a tensor (N, H, W, ...) with them."""
    image: Tensor  # (S, )
    row: Tensor  # (S, )
    column: Tensor  # (S, )


def as_maps(layer: nn.Module, values: Tensor) -> Tensor:
    """View inputs or outputs of a convolution or linear layer as feature maps (N, H, W, C).

    Those (N, ..., C) of a linear layer have the shape (N, 1, L, C).
    """
    if isinstance(layer, nn.Linear):
        return values.reshape(len(values), 1, -1, values.shape[-1])
    return values.permute(0, 2, 3, 1)


def draw_places(maps: Tensor, numbers: Sequence[int], limit: int) -> Places:
    """Draw random places in feature maps (N, H, W, C): all or so many of each map.

    They depend on nothing but the size of the maps and the numbers of the images they belong to,
    as many consecutive maps to each. Without numbers they count as those of image 0.
    """
    height, width = maps.shape[1:3]
    chosen = []
    for seed in _seeds(len(maps), numbers):
        generator = torch.Generator().manual_seed(seed)
        chosen.append(torch.randperm(height * width, generator=generator)[:limit])
    inside = torch.stack(chosen)
    image = torch.arange(len(maps))[:, None].expand_as(inside)
    rows = torch.div(inside, width, rounding_mode='floor')
    return Places(*(values.flatten().to(maps.device) for values in (image, rows, inside % width)))


class DrawnPlaces:
    """Draws places for the same images, the same for maps of the same size.

    Args:
        numbers, limit: See :func:`draw_places`.
    """

    def __init__(self, numbers: Sequence[int], limit: int):
        self._numbers, self._limit = numbers, limit
        self._places: Dict[Tuple[int, ...], Places] = {}

    def __call__(self, maps: Tensor) -> Places:
        """Return places in feature maps (N, H, W, C)."""
        size = tuple(maps.shape[:3])
        if size not in self._places:
            self._places[size] = draw_places(maps, self._numbers, self._limit)
        return self._places[size]


def _seeds(maps: int, numbers: Sequence[int]) -> Iterator[int]:
    each = max(1, maps // max(1, len(numbers)))
    for index in range(maps):
        number = numbers[index // each] if index // each < len(numbers) else 0
        yield number * each + index % each


def read_patches(layer: nn.Module, maps: Tensor, places: Places) -> Tensor:
    """Return what a layer reads for its outputs at S places: (S, T, C) for a kernel of T taps.

    The layer is a linear one or a convolution that is not transposed, and reads maps
    (N, H, W, C), which may be only some of its channels.
    """
    if isinstance(layer, nn.Linear):
        return maps[places][:, None]
    row, column = (_tap_positions(layer, axis, start, maps.shape[1 + axis])
                   for axis, start in enumerate((places.row, places.column)))
    patches = maps[places.image[:, None, None], row[:, :, None].clamp(min=0),
                   column[:, None].clamp(min=0)]
    outside = (row < 0)[:, :, None] | (column < 0)[:, None]
    patches[outside] = 0
    return patches.flatten(1, 2)


def _tap_positions(layer: nn.Module, axis: int, starts: Tensor, size: int) -> Tensor:
    """Return where T taps read along an axis for outputs (S, ): (S, T), -1 for zeros."""
    padding = layer._reversed_padding_repeated_twice[2 - 2 * axis:4 - 2 * axis]
    positions = torch.arange(size, dtype=torch.double)[None, None]
    if layer.padding_mode == 'zeros':
        positions = F.pad(positions, padding, value=-1)
    else:
        positions = F.pad(positions, padding, mode=layer.padding_mode)
    taps = torch.arange(layer.kernel_size[axis], device=starts.device) * layer.dilation[axis]
    return positions[0, 0].long().to(starts.device)[starts[:, None] * layer.stride[axis] + taps]

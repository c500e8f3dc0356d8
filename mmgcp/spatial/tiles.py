# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Cutting square tiles out of feature maps, and putting them back.

A tile has a place: the index of its image, its row and its column, in units of tiles. Tiles
begin at the upper left corner of a map; the last ones may reach beyond its other edges.
"""
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def active_places(keep: Tensor, tile: int) -> Tensor:
    """Find the tiles in which any cell is kept.

    Args:
        keep (Tensor): Boolean (N, 1, H, W).
        tile (int): Side of a tile in cells.

    Returns:
        Tensor: Their places (T, 3), sorted.
    """
    height, width = keep.shape[-2:]
    padded = F.pad(keep.float(), (0, -width % tile, 0, -height % tile))
    return F.max_pool2d(padded, tile)[:, 0].nonzero()


def cut(maps: Tensor, places: Tensor, tile: int, halo: int) -> Tensor:
    """Cut tiles out of maps, with a margin.

    Args:
        maps (Tensor): (N, C, H, W).
        places (Tensor): Places (T, 3).
        tile (int): Side of a tile in cells.
        halo (int): Width of the margin in cells.

    Returns:
        Tensor: (T, C, S, S) with S = tile + 2 * halo; zero outside of the maps.
    """
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (halo, halo + -width % tile, halo, halo + -height % tile))
    windows = padded.unfold(2, tile + 2 * halo, tile).unfold(3, tile + 2 * halo, tile)
    images, rows, columns = places.unbind(1)
    return windows[images, :, rows, columns]


def paste(tiles: Tensor, places: Tensor, size: Sequence[int]) -> Tensor:
    """Put tiles (T, C, S, S) without margins into maps.

    Args:
        tiles (Tensor): The tiles.
        places (Tensor): Their places (T, 3).
        size (Sequence[int]): N, H and W of the maps.

    Returns:
        Tensor: (N, C, H, W); zero where there is no tile.
    """
    (number, height, width), (channels, tile) = size, tiles.shape[1:3]
    rows, columns = -(-height // tile), -(-width // tile)
    maps = tiles.new_zeros(number, channels, rows, tile, columns, tile)
    images, row, column = places.unbind(1)
    maps.permute(0, 2, 4, 1, 3, 5)[images, row, column] = tiles
    maps = maps.view(number, channels, rows * tile, columns * tile)
    return maps[:, :, :height, :width].contiguous()


def inside(places: Tensor, tile: int, halo: int, size: Sequence[int]) -> Tensor:
    """Say which cells of tiles with their margins are inside of maps of a size (H, W).

    Returns:
        Tensor: Boolean (T, 1, S, S) with S = tile + 2 * halo.
    """
    steps = torch.arange(-halo, tile + halo, device=places.device)
    rows, columns = (places[:, 1:, None] * tile + steps).unbind(1)
    rows, columns = ((cells >= 0) & (cells < side) for cells, side in zip((rows, columns), size))
    return (rows[:, :, None] & columns[:, None])[:, None]

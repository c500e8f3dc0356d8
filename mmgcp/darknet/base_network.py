# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The unpruned YOLOv4 that contains a network with any numbers of filters."""
from typing import Callable, Dict, List, Sequence

import torch.nn as nn

from mmgcp.pruning import count_channels
from mmgcp.pruning.detector import ChannelTable, changed_sides

from .cfg import DarknetError, Section
from .matching import channel_table, conv_channels, match_layers

# Building a detector of this width takes 4 GB of memory.
MAX_WIDEN_FACTOR = 4


def find_widen_factor(sections: Sequence[Section],
                      build: Callable[[float], nn.Module]) -> float:
    """Find the smallest widen_factor that gives each layer at least as many filters.

    If it gives each layer exactly as many, the network is unpruned.

    Args:
        sections (Sequence[Section]): All sections of the cfg.
        build (Callable): Builds the unpruned detector of a widen_factor.

    Returns:
        float: The factor, a multiple of 1 / 128; factors between these give the same widths.

    Raises:
        DarknetError: The factor would exceed 4.
    """
    # Widths are multiples of 8, or of 16 where YOLOv4 doubles a width that was rounded up.
    # At 1 / 128 each layer has this multiple, at 1 / 2 exactly half of its full width.
    narrowest, half = build(1 / 128), build(1 / 2)
    smallest = 1 / 128
    for index, layer in enumerate(match_layers(sections)):
        if not layer.has_norm:
            continue
        filters = sections[index + 1].integer('filters')
        step = conv_channels(narrowest, layer.module)[1]
        full_width = 2 * conv_channels(half, layer.module)[1]
        too_few = (filters - 1) // step * step
        factor = (128 * too_few // full_width + 1) / 128  # the first above too_few / full_width
        if factor > MAX_WIDEN_FACTOR:
            raise DarknetError(
                f'layer {index}, {sections[index + 1]}, has {filters} filters, for which the '
                f'network would have to be pruned from a YOLOv4 {factor:g} times as wide; '
                f'{MAX_WIDEN_FACTOR} is the most')
        smallest = max(smallest, factor)
    return smallest


def changed_channels(sections: Sequence[Section], base: nn.Module) -> ChannelTable:
    """List the layers that have fewer channels than in the unpruned detector.

    Args:
        sections (Sequence[Section]): All sections of the cfg.
        base (nn.Module): The unpruned detector.

    Returns:
        dict[str, list[int | None]]: Their channels; see :func:`mmgcp.pruning.PrunedDetector`.
    """
    channels = channel_table(sections)
    present = count_channels(base)
    table: Dict[str, List[int]] = {}
    for layer in match_layers(sections):
        if layer.has_norm:
            table[f'{layer.module}.conv'] = list(channels[layer.module])
            table[f'{layer.module}.bn'] = [channels[layer.module][1]]
        elif layer.module:
            table[layer.module] = list(channels[layer.module])
    return changed_sides(present, table)

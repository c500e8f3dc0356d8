# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The unpruned YOLOv4 that contains a network with any numbers of filters.

It is not built, as it can be a thousand times as large as the network: its channels follow from
those of two shallow and narrow ones.
"""
import re
from typing import Callable, List, NamedTuple, Sequence

import torch.nn as nn

from mmgcp.pruning.channel_table import ChannelTable

from .cfg import DarknetError, Section
from .matching import channel_table, conv_channels, match_layers

# Building a detector of this width takes 1 GB of memory, also for a small network pruned from it
MAX_WIDEN_FACTOR = 2
# Builds an unpruned detector of a widen_factor, of any depth and with any classes
Build = Callable[[float], nn.Module]


class Width(NamedTuple):
    """Filters of a layer: ``full`` times the widen_factor, rounded up to a multiple of ``step``."""
    step: int
    full: int

    def filters(self, widen_factor: float) -> int:
        """Return the filters at a widen_factor, a multiple of 1 / 128."""
        scaled = round(128 * widen_factor) * self.full
        return self.step * -(-scaled // (128 * self.step))


def find_widen_factor(sections: Sequence[Section], build: Build) -> float:
    """Find the smallest widen_factor that gives each layer at least as many filters.

    If it gives each layer exactly as many, the network is unpruned.

    Args:
        sections (Sequence[Section]): All sections of the cfg.
        build (Callable): Builds an unpruned detector of a widen_factor, of any depth.

    Returns:
        float: The factor, a multiple of 1 / 128; factors between these give the same widths.

    Raises:
        DarknetError: The factor would exceed 2.
    """
    smallest = 1 / 128
    for index, width in enumerate(_widths(sections, build)):
        if width is None:
            continue
        filters = sections[index + 1].integer('filters')
        too_few = (filters - 1) // width.step * width.step
        factor = (128 * too_few // width.full + 1) / 128  # the first above too_few / full
        if factor > MAX_WIDEN_FACTOR:
            raise DarknetError(
                f'layer {index}, {sections[index + 1]}, has {filters} filters, for which the '
                f'network would have to be pruned from a YOLOv4 {factor:g} times as wide; '
                f'{MAX_WIDEN_FACTOR} is the most')
        smallest = max(smallest, factor)
    return smallest


def changed_channels(sections: Sequence[Section], widen_factor: float,
                     build: Build) -> ChannelTable:
    """List the layers that have fewer channels than in the unpruned detector.

    Args:
        sections (Sequence[Section]): All sections of the cfg.
        widen_factor (float): That of the unpruned detector, which is as deep.
        build (Callable): Builds an unpruned detector of a widen_factor, of any depth.

    Returns:
        dict[str, list[int | None]]: Their channels; see :func:`mmgcp.pruning.PrunedDetector`.
    """
    channels, present = channel_table(sections), channel_table(
        _unpruned_sections(sections, widen_factor, build))
    table: ChannelTable = {}
    for layer in match_layers(sections):
        if not layer.module or channels[layer.module] == present[layer.module]:
            continue
        counts = [new if new != old else None for old, new in zip(
            present[layer.module], channels[layer.module])]
        if not layer.has_norm:
            table[layer.module] = counts
            continue
        table[f'{layer.module}.conv'] = counts
        if counts[1] is not None:
            table[f'{layer.module}.bn'] = counts[1:]
    return table


def _unpruned_sections(sections: Sequence[Section], widen_factor: float,
                       build: Build) -> List[Section]:
    """Return the sections with the filters that the unpruned detector has."""
    widths = [None, *_widths(sections, build)]  # of [net], too
    return [section if width is None else
            Section(section.name, dict(section.options, filters=str(width.filters(widen_factor))),
                    section.line) for section, width in zip(sections, widths)]


def _widths(sections: Sequence[Section], build: Build) -> List:
    """Return the width of each layer after [net], None of those without normalisation."""
    # Widths are multiples of 8, or of 16 where YOLOv4 doubles a width that was rounded up.
    # At 1 / 128 each layer has this multiple, at 1 / 2 exactly half of its full width.
    narrowest, half = build(1 / 128), build(1 / 2)
    widths: List = []
    for layer in match_layers(sections):
        name = re.sub(r'blocks\.\d+', 'blocks.0', layer.module)  # all blocks of a stage are alike
        widths.append(Width(conv_channels(narrowest, name)[1], 2 * conv_channels(half, name)[1])
                      if layer.has_norm else None)
    return widths

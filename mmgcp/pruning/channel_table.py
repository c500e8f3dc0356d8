# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Channel tables: how many channels each layer of a model has, and models reduced to them."""
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import Layer, channel_counts, has_channels, is_depthwise, keep_channels

from .attributes import refresh_attributes

ChannelTable = Dict[str, List[Optional[int]]]


def count_channels(model: nn.Module) -> ChannelTable:
    """List the channels of all layers of a model; see :func:`PrunedDetector`."""
    counts = {name: channel_counts(layer) for name, layer in _named_layers(model).items()}
    return {name: numbers for name, numbers in counts.items() if numbers}


def apply_channel_table(model: nn.Module, table: ChannelTable, widen: bool = False) -> None:
    """Reduce the layers of a model to their first channels, as many as a table says.

    Args:
        model (nn.Module): The model as its config builds it, changed in place.
        table (dict[str, list[int | None]]): See :func:`PrunedDetector`.
        widen (bool): Whether layers that have too few channels get more, which are copies.
            Defaults to False.

    Raises:
        PruningError: A layer is missing, of another kind, or has too few channels;
            nothing has been changed.
    """
    layers = _named_layers(model)
    wanted = {}
    for name, counts in table.items():
        if name not in layers:
            raise PruningError(f'the channel table names {name!r}, which the detector does not '
                               'have: is it the architecture that was pruned?')
        wanted[name] = _filled(counts, layers[name])
        if not _can_have(layers[name], wanted[name], widen):
            present, groups = channel_counts(layers[name]), _num_groups(layers[name])
            raise PruningError(f'the channel table asks for {list(counts)} channels in {name!r}, '
                               f'but the detector has {present} there'
                               + (f' in {groups} groups' if groups > 1 else ''))
    for name, counts in wanted.items():
        for side, keep in _kept(layers[name], counts):
            keep_channels(model, name, side, keep)
    refresh_attributes(model)


def changed_sides(before: ChannelTable, after: ChannelTable) -> ChannelTable:
    """List the layers whose channels differ, with None for the side on which they do not."""
    return {name: [new if new != old else None for old, new in zip(before[name], counts)]
            for name, counts in after.items() if counts != before[name]}


def merged_tables(first: ChannelTable, second: ChannelTable) -> ChannelTable:
    """Override a table, of which a pruned detector has been built, by what has changed since."""
    merged = dict(first)
    for name, counts in second.items():
        before = first.get(name, [None] * len(counts))
        merged[name] = [old if new is None else new for old, new in zip(before, counts)]
    return merged


def without_blocks(table: ChannelTable, absent: Iterable[str]) -> ChannelTable:
    """Leave the layers of absent blocks out of a table."""
    return {name: counts for name, counts in table.items()
            if not any(name.startswith(f'{block}.') for block in absent)}


def _filled(counts: Sequence[Optional[int]], layer: Layer) -> List[int]:
    """Replace None in the numbers of a table by what a layer has on that side."""
    present = channel_counts(layer)
    if len(present) != len(counts):
        return list(counts)
    return [there if count is None else count for count, there in zip(counts, present)]


def _named_layers(model: nn.Module) -> Dict[str, Layer]:
    """Return the modules of a model, and the parameters that belong to no layer with channels."""
    layers: Dict[str, Layer] = dict(model.named_modules())
    owned = {parameter for layer in layers.values() if channel_counts(layer)
             for parameter in layer.parameters()}
    layers.update((name, parameter) for name, parameter in model.named_parameters()
                  if parameter not in owned and has_channels(parameter))
    return layers


def _num_groups(layer: Layer) -> int:
    return getattr(layer, 'groups', getattr(layer, 'num_groups', 1))


def _can_have(layer: Layer, counts: List[int], widen: bool) -> bool:
    """Whether a layer can be reduced to these numbers of channels, or widened to them."""
    present = channel_counts(layer)
    if len(present) != len(counts) or not all(
            isinstance(a, int) and a > 0 and (widen or a <= b) for a, b in zip(counts, present)):
        return False
    if is_depthwise(layer):
        return counts[0] == counts[1]
    if isinstance(layer, nn.GroupNorm):  # only whole groups can go
        return counts[0] % (layer.num_channels // layer.num_groups) == 0
    return all(count % _num_groups(layer) == 0 for count in counts)


def _kept(layer: Layer, counts: List[int]) -> Iterator[Tuple[str, Tensor]]:
    """Yield the channels that stay on each side: the first ones, of each group; then copies."""
    present = channel_counts(layer)
    if len(counts) == 1 or is_depthwise(layer):
        yield 'out', torch.arange(counts[-1]) % present[-1]
        return
    for side, count, there in zip(('in', 'out'), counts, present):
        channels = torch.arange(there).view(_num_groups(layer), -1)
        chosen = torch.arange(count // len(channels)) % channels.shape[1]
        yield side, channels[:, chosen].flatten()

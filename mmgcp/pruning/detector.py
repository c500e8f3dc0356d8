# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, Iterator, List, Tuple

import torch
import torch.nn as nn
from mmyolo.registry import MODELS as MMYOLO_MODELS
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import (
    Layer,
    channel_counts,
    has_channels,
    is_depthwise,
    keep_channels,
    num_channels,
)
from mmgcp.registry import MODELS

from .attributes import refresh_attributes

ChannelTable = Dict[str, List[int]]


@MODELS.register_module()
def PrunedDetector(detector: str, channels: ChannelTable, **kwargs) -> nn.Module:  # noqa: N802
    """Build a pruned detector: an ordinary detector with fewer channels in some layers.

    It is a function that the registry calls like a class: what it returns is of the
    original detector's class, with the original names of parameters.

    Args:
        detector (str): Type of the original detector, as ``'YOLODetector'``.
        channels (dict[str, list[int]]): The channels that are left in the layers that
            were pruned: [in, out] of convolutions and linear layers, [features] of
            normalisation layers and bare parameters.
        **kwargs: The arguments of the original detector.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: The table does not fit the detector.
    """
    model = MMYOLO_MODELS.build(dict(type=detector, **kwargs))
    apply_channel_table(model, channels)
    return model


def count_channels(model: nn.Module) -> ChannelTable:
    """List the channels of all layers of a model; see :func:`PrunedDetector`."""
    counts = {name: channel_counts(layer) for name, layer in _named_layers(model).items()}
    return {name: numbers for name, numbers in counts.items() if numbers}


def apply_channel_table(model: nn.Module, table: ChannelTable) -> None:
    """Reduce the layers of a model to the first channels, as many as a table says.

    Args:
        model (nn.Module): The model as its config builds it, changed in place.
        table (dict[str, list[int]]): See :func:`PrunedDetector`.

    Raises:
        PruningError: A layer is missing, of another kind, or has too few channels;
            nothing has been changed.
    """
    layers = _named_layers(model)
    for name, counts in table.items():
        if name not in layers:
            raise PruningError(f'the channel table names {name!r}, which the detector does not '
                               'have: is it the architecture that was pruned?')
        if not _can_have(layers[name], counts):
            present, groups = channel_counts(layers[name]), _num_groups(layers[name])
            raise PruningError(f'the channel table asks for {list(counts)} channels in {name!r}, '
                               f'but the detector has {present} there'
                               + (f' in {groups} groups' if groups > 1 else ''))
    for name, counts in table.items():
        for side, keep in _kept(layers[name], counts):
            keep_channels(model, name, side, keep)
    refresh_attributes(model)


def _named_layers(model: nn.Module) -> Dict[str, Layer]:
    """The modules of a model, and the parameters that no layer with weights owns."""
    layers: Dict[str, Layer] = dict(model.named_modules())
    owned = {parameter for layer in layers.values() if channel_counts(layer)
             for parameter in layer.parameters()}
    layers.update((name, parameter) for name, parameter in model.named_parameters()
                  if parameter not in owned and has_channels(parameter))
    return layers


def _num_groups(layer: Layer) -> int:
    return getattr(layer, 'groups', getattr(layer, 'num_groups', 1))


def _can_have(layer: Layer, counts: List[int]) -> bool:
    """Whether a layer can be reduced to numbers of channels."""
    present = channel_counts(layer)
    if len(present) != len(counts) or not all(
            isinstance(a, int) and 0 < a <= b for a, b in zip(counts, present)):
        return False
    if is_depthwise(layer):
        return counts[0] == counts[1]
    if isinstance(layer, nn.GroupNorm):  # whole groups stay
        return counts[0] % (layer.num_channels // layer.num_groups) == 0
    return all(count % _num_groups(layer) == 0 for count in counts)


def _kept(layer: Layer, counts: List[int]) -> Iterator[Tuple[str, Tensor]]:
    """The sides of a layer and the first channels of each, in a grouped layer of each group."""
    if len(counts) == 1 or is_depthwise(layer):
        yield 'out', torch.arange(counts[-1])
        return
    for side, count in zip(('in', 'out'), counts):
        channels = torch.arange(num_channels(layer, side)).view(_num_groups(layer), -1)
        yield side, channels[:, :count // len(channels)].flatten()

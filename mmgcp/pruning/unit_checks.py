# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Why channel units have to be left alone."""
from typing import Container, Dict, Iterable, Optional, Set, Tuple

import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.nn.layers import (
    WEIGHT_TYPES,
    Layer,
    channel_counts,
    find_layer,
    has_channels,
    is_depthwise,
    is_grouped,
    num_channels,
)

from .tracing import splits_rightly
from .units import ChannelUnit

Side = Tuple[str, str]  # name of a layer, and 'in' or 'out'


def unclear_layers(graph, units: Iterable[ChannelUnit]) -> Dict[Side, str]:
    """Find the layers whose channels the units do not explain.

    Torch-Pruning loses channels on some ways through concatenations, and does not know what
    happens in every function.

    Args:
        graph (ChannelGraph): The graph that the units are from.
        units (Iterable[ChannelUnit]): All units.

    Returns:
        dict[tuple, str]: Reasons by layer and side: of layers that read something unclear, and
        of the layers that it is from.
    """
    known: Dict[Side, Set[int]] = {}
    unclear: Dict[Side, str] = {}
    for unit in units:
        reason = find_contradiction(graph.model, unit, known)
        if reason:
            unclear.update({(item.module, item.side): reason for item in unit.slices})
    for node in graph.nodes:
        reason = _unclear_operation(graph, node)
        readers = set()
        if reason is None and isinstance(node.module, WEIGHT_TYPES):
            name = graph.name_of(node.module)
            channels = set(range(num_channels(node.module, 'in')))
            if not is_depthwise(node.module) and known.get((name, 'in')) != channels:
                reason = f'it is not clear which layer each input channel of {name} is from'
                readers.add((name, 'in'))
        producers = {(name, 'out') for name in graph.nearest_layers(node.inputs)} if reason else ()
        if producers:
            unclear.update(dict.fromkeys(readers.union(producers), reason))
    return unclear


def _unclear_operation(graph, node) -> Optional[str]:
    """Why the channels behind an operation are not those before it."""
    observer = graph.observer
    if node.grad_fn in observer.with_constants:
        return 'it is combined with something that is not the output of a layer'
    if node.grad_fn in observer.mixing and not graph.has_weights(node):
        return 'its channels are mixed or reordered by something without weights'
    if graph.cuts_channels(node) and not splits_rightly(observer.splits.get(node.grad_fn)):
        return 'its channels are split by a module that does not say how'
    return None


def find_contradiction(model: nn.Module, unit: ChannelUnit, known: Dict[Side, Set[int]]) -> str:
    """Say why a unit contradicts others or the layers themselves.

    Args:
        model (nn.Module): The model.
        unit (ChannelUnit): The unit.
        known (dict[tuple, set[int]]): Channels of the other units, by layer and side. Those of
            this one are added.

    Returns:
        str: The reason, empty if there is no contradiction.
    """
    reason = ''
    for item in unit.slices:
        channels = set(item.channels.tolist())
        layer = find_layer(model, item.module)
        beyond = channel_counts(layer) and max(channels) >= num_channels(layer, item.side)
        others = known.setdefault((item.module, item.side), set())
        if channels & others or beyond:
            reason = f'it is not clear which of its channels {item.module} has'
        others |= channels
    return reason


def check_unit(unit: ChannelUnit, layers: Dict[str, Layer], predictions: Container[str],
               unclear: Dict[Side, str]) -> None:
    """Check that a unit can be pruned.

    Args:
        unit (ChannelUnit): The unit.
        layers (dict[str, nn.Module | nn.Parameter]): Its layers by name.
        predictions (Container[str]): Names of the layers that return the predictions.
        unclear (dict[tuple, str]): See :func:`unclear_layers`.

    Raises:
        PruningError: It cannot; the message is the reason.
    """
    for item in unit.slices:
        layer = layers[item.module]
        if isinstance(layer, nn.Parameter) and not has_channels(layer):
            raise PruningError(f'it is coupled with the parameter {item.module}')
        if item.module in predictions and item.side == 'out':
            raise PruningError(f'it is coupled with the prediction layer {item.module}')
        if not channel_counts(layer):
            raise PruningError(f'it is coupled with the {type(layer).__name__} {item.module}')
        if _is_multiplier(layer):
            raise PruningError(f'it is coupled with the grouped convolution {item.module}')
        if (item.module, item.side) in unclear:
            raise PruningError(unclear[item.module, item.side])
        if len(item.channels.unique()) != len(item.channels):
            raise PruningError(f'several of its channels are tied to each other in {item.module}')


def _is_multiplier(layer: Layer) -> bool:
    """Whether a convolution computes several channels of each; Torch-Pruning miscounts those."""
    return is_grouped(layer) and layer.groups in (layer.in_channels, layer.out_channels)

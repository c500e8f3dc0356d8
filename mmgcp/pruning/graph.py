# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From a model to its channel units, and to the layers that cannot be pruned."""
from typing import Dict, List, Sequence, Set, Tuple

import torch
import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels

from .constraints import constrain
from .tracing import traceable
from .unit_checks import check_unit, unclear_layers
from .units import ChannelSlice, ChannelUnit

PREDICTIONS = 'its outputs are the predictions'


def find_units(
        model: nn.Module,
        input_shape: Sequence[int] = (3, 128, 128)
) -> Tuple[List[ChannelUnit], Dict[str, str]]:
    """Find the channels that can only be removed together.

    Modules with an attribute ``training_only`` must have been taken out of the model before.
    It is a sentence that says how.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``, or a
            two-stage detector of MMDetection. It is left as it was.
        input_shape (Sequence[int]): Shape (C, H, W) in pixels of the image to trace with.
            Defaults to (3, 128, 128).

    Returns:
        tuple: The prunable channel units in the order of the model's layers, and the layers
        that cannot be pruned, each with the reason.

    Raises:
        PruningError: The model cannot be traced or has modules that are only for training, or
            Torch-Pruning is not installed.
    """
    _check_trained(model)
    with traceable(model) as modes:
        graph = _build_graph(model, input_shape, modes)
        predictions = graph.prediction_layers()
        skipped = dict.fromkeys(predictions, PREDICTIONS)
        found = _follow_layers(graph, skipped)
        unclear = unclear_layers(graph, found)
    units = []
    for unit in found:
        layers = {item.module: find_layer(model, item.module) for item in unit.slices}
        try:
            check_unit(unit, layers, predictions, unclear)
            units.append(constrain(unit, layers))
        except PruningError as reason:
            for item in unit.side('out'):
                skipped.setdefault(item.module, str(reason))
    return units, skipped


def _check_trained(model: nn.Module) -> None:
    """Raise a PruningError if the model has modules that are only for training."""
    for name, module in model.named_modules():
        how = getattr(module, 'training_only', None)
        if how:
            raise PruningError(f'{name} ({type(module).__name__}) is only for training and has '
                               f'to be taken out of the model before it is pruned: {how}')


def _build_graph(model: nn.Module, input_shape: Sequence[int], modes: Dict[nn.Module, bool]):
    """Trace the model; returns a :class:`mmgcp.pruning.dependencies.ChannelGraph`."""
    try:
        from .dependencies import ChannelGraph
    except ImportError:
        raise PruningError('pruning needs Torch-Pruning 1.6.1, which is not installed: '
                           'pip install --no-deps torch-pruning==1.6.1') from None
    try:
        return ChannelGraph(model, input_shape, modes)
    except Exception as error:  # whatever the model or Torch-Pruning raises
        raise PruningError('the model cannot be traced: '
                           f'{type(error).__name__}: {error}') from error


def _follow_layers(graph, skipped: Dict[str, str]) -> List[ChannelUnit]:
    """The units of all layers with weights that are not skipped; adds layers to the skipped."""
    units: List[ChannelUnit] = []
    covered: Dict[str, Set[int]] = {}  # layer -> output channels that are in units
    for name, module in graph.model.named_modules():
        if (not isinstance(module, WEIGHT_TYPES) or module not in graph.module2node
                or name in skipped):
            continue
        channels = sorted(set(range(num_channels(module, 'out'))) - covered.get(name, set()))
        if not channels:
            continue
        try:
            units.append(_make_unit(name, len(channels), graph.follow(module, channels)))
        except PruningError as reason:  # the layers that read its channels will miss them
            skipped[name] = str(reason)
            continue
        for item in units[-1].side('out'):
            covered.setdefault(item.module, set()).update(item.channels.tolist())
    return units


def _make_unit(name: str, size: int, reached) -> ChannelUnit:
    """The unit of what a layer's channels have reached."""
    slices = tuple(ChannelSlice(layer, side, *torch.tensor(list(pairs)).unbind(1))
                   for (layer, side), pairs in reached.items())
    return ChannelUnit(name, size, slices)

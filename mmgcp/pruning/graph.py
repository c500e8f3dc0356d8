# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From a model to its channel units, and to the layers that cannot be pruned."""
from typing import Dict, List, Sequence, Set, Tuple

import torch
import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels

from .tracing import traceable
from .unit_checks import check_unit, constrain, unclear_layers
from .units import ChannelSlice, ChannelUnit

PREDICTIONS = 'its outputs are the predictions'


def find_units(
        model: nn.Module,
        input_shape: Sequence[int] = (3, 128, 128)
) -> Tuple[List[ChannelUnit], Dict[str, str]]:
    """Find the channels that can only be removed together.

    The model, a detector for :func:`mmgcp.nn.forward.run_as_tensors`, is traced with an image
    (C, H, W) of noise and left as it was. Returns the prunable channel units in the order of the
    model's layers, and the layers that cannot be pruned, each with the reason. Raises a
    PruningError if the model cannot be traced or Torch-Pruning is not installed, or if there are
    modules for training only: their attribute ``training_only`` says how to take them out.
    """
    for name, module in model.named_modules():
        how = getattr(module, 'training_only', None)
        if how:
            raise PruningError(f'{name} ({type(module).__name__}) is only for training and has '
                               f'to be taken out of the model before it is pruned: {how}')
    with traceable(model):
        graph = _build_graph(model, input_shape)
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


def _build_graph(model: nn.Module, input_shape: Sequence[int]):
    """Trace the model; returns a :class:`mmgcp.pruning.dependencies.ChannelGraph`."""
    try:
        from .dependencies import ChannelGraph
    except ImportError:
        raise PruningError('pruning needs Torch-Pruning 1.6.1, which is not installed: '
                           'pip install --no-deps torch-pruning==1.6.1') from None
    try:
        return ChannelGraph(model, input_shape)
    except Exception as error:  # whatever the model or Torch-Pruning raises
        raise PruningError('the model cannot be traced: '
                           f'{type(error).__name__}: {error}') from error


def _follow_layers(graph, skipped: Dict[str, str]) -> List[ChannelUnit]:
    """Return the units of all layers with weights that are not skipped; may skip more layers."""
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
            reached = graph.follow(module, channels)
        except PruningError as reason:  # the layers that read its channels will miss them
            skipped[name] = str(reason)
            continue
        slices = tuple(ChannelSlice(layer, side, *torch.tensor(list(pairs)).unbind(1))
                       for (layer, side), pairs in reached.items())
        units.append(ChannelUnit(name, len(channels), slices))
        for item in units[-1].side('out'):
            covered.setdefault(item.module, set()).update(item.channels.tolist())
    return units

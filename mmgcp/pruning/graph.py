# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From a model to its channel units, and to the layers that cannot be pruned, with the reason."""
from dataclasses import replace
from typing import Container, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError, told
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

from .branches import Branches, find_branches
from .tracing import splits_rightly
from .units import ChannelSlice, ChannelUnit

PREDICTIONS = 'its outputs are the predictions'
UNREAD = 'no prediction depends on its outputs'


class TracingError(PruningError):
    """A model whose channels cannot be followed."""


Side = Tuple[str, str]  # name of a layer, and 'in' or 'out'


def find_units(
        model: nn.Module,
        input_shape: Sequence[int] = (3, 128, 128)
) -> Tuple[List[ChannelUnit], Dict[str, str]]:
    """Find the channels that can only be removed together.

    The model, a detector for :func:`mmgcp.nn.forward.run_as_tensors`, is traced with an image
    (C, H, W) of noise and left as it was. Returns the prunable channel units in the order of the
    model's layers, and the layers that cannot be pruned, each with the reason. Raises a
    PruningError if the model cannot be traced or Torch-Pruning is not installed, or if there are
    modules for training only: their attribute ``training_only`` says how to take them out. So
    does ``not_pruned`` of others that do not go with pruning.
    """
    for name, module in model.named_modules():
        how = getattr(module, 'training_only', None)
        if how:
            raise PruningError(f'{name} ({type(module).__name__}) is only for training and has '
                               f'to be taken out of the model before it is pruned: {how}')
        if hasattr(module, 'not_pruned'):
            raise PruningError(f'a detector with {name} ({type(module).__name__}) cannot be '
                               f'pruned: {module.not_pruned}')
    graph = _build_graph(model, input_shape)
    predictions = graph.prediction_layers()
    skipped = {**dict.fromkeys(graph.unread_layers(), UNREAD),
               **dict.fromkeys(predictions, PREDICTIONS)}
    blocks = find_branches(model, [node.grad_fn for node in graph.module2node.values()])
    found = [with_branches(unit, blocks) for unit in _follow_layers(graph, skipped)]
    unclear = _unclear_layers(graph, found)
    units = []
    for unit in found:
        layers = {item.module: find_layer(model, item.module) for item in unit.slices}
        try:
            _check_unit(unit, layers, predictions, unclear)
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
        raise TracingError(f'the model cannot be traced: {told(error)}') from error


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


def with_branches(unit: ChannelUnit, blocks: Iterable[Branches]) -> ChannelUnit:
    """Add the blocks of parallel branches whose layers all have channels of a unit to it."""
    layers = {item.module for item in unit.side('out')}
    return replace(unit, branches=tuple(block for block in blocks if layers.issuperset(block)))


def _unclear_layers(graph, units: Iterable[ChannelUnit]) -> Dict[Side, str]:
    """Find the layers whose channels the units of a graph do not explain.

    Torch-Pruning loses channels on some ways through concatenations, and does not know what
    happens in every function. Returns the reasons by layer and side: of the layers that read
    something unclear, and of the layers that it is from.
    """
    known: Dict[Side, Set[int]] = {}
    unclear: Dict[Side, str] = {}
    for unit in units:
        reason = find_contradiction(graph.model, unit, known)
        if reason:
            unclear.update({(item.module, item.side): reason for item in unit.slices})
    for node in graph.module2node.values():
        reason = _unclear_operation(graph, node)
        consumers = set()
        if reason is None and isinstance(node.module, WEIGHT_TYPES):
            name = graph.name_of(node.module)
            channels = set(range(num_channels(node.module, 'in')))
            if not is_depthwise(node.module) and known.get((name, 'in')) != channels:
                reason = f'it is not clear which layer each input channel of {name} is from'
                consumers.add((name, 'in'))
        producers = {(name, 'out') for name in graph.nearest_layers(node.inputs)} if reason else ()
        if producers:
            unclear.update(dict.fromkeys(consumers.union(producers), reason))
    return unclear


def _unclear_operation(graph, node) -> Optional[str]:
    """Say why the channels behind an operation are not those before it, if they are not."""
    observer = graph.observer
    if node.grad_fn in observer.with_constants:
        return 'it is combined with something that is not the output of a layer'
    if node.grad_fn in observer.mixing and not graph.has_weights(node):
        return 'its channels are mixed or reordered by something without weights'
    if graph.cuts_channels(node) and not splits_rightly(observer.splits.get(node.grad_fn)):
        return 'its channels are split by a module that does not say how'
    return None


def find_contradiction(model: nn.Module, unit: ChannelUnit, known: Dict[Side, Set[int]]) -> str:
    """Say why a unit contradicts the layers or the other units; empty if it does not.

    ``known`` has the channels of the other units; those of this one are added.
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


def _check_unit(unit: ChannelUnit, layers: Dict[str, Layer], predictions: Container[str],
               unclear: Dict[Side, str]) -> None:
    """Raise a PruningError with the reason if a unit, whose layers are given, cannot be pruned."""
    for item in unit.slices:
        layer = layers[item.module]
        if isinstance(layer, nn.Parameter) and not has_channels(layer):
            raise PruningError(f'it is coupled with the parameter {item.module}')
        if item.module in predictions and item.side == 'out':
            raise PruningError(f'it is coupled with the prediction layer {item.module}')
        if not channel_counts(layer):
            raise PruningError(f'it is coupled with the {type(layer).__name__} {item.module}')
        # Torch-Pruning miscounts what computes several channels of each
        if is_grouped(layer) and layer.groups in (layer.in_channels, layer.out_channels):
            raise PruningError(f'it is coupled with the grouped convolution {item.module}')
        if (item.module, item.side) in unclear:
            raise PruningError(unclear[item.module, item.side])
        if len(item.channels.unique()) != len(item.channels):
            raise PruningError(f'several of its channels are tied to each other in {item.module}')


def constrain(unit: ChannelUnit, layers: Dict[str, Layer]) -> ChannelUnit:
    """Add the groups that GroupNorms and grouped convolutions among its layers require to a unit.

    Raises a PruningError with the reason if no part of the unit can be removed.
    """
    norms = [item for item in unit.slices if isinstance(layers[item.module], nn.GroupNorm)]
    convs = [item for item in unit.slices if is_grouped(layers[item.module])]
    if norms and convs:
        raise PruningError(f'it is coupled with both the GroupNorm {norms[0].module} and the '
                           f'grouped convolution {convs[0].module}')
    if norms:
        return replace(unit, norm_groups=_norm_groups(unit, norms, layers))
    if convs:
        return replace(unit, conv_groups=_conv_groups(unit, convs, layers))
    return unit


def _norm_groups(unit: ChannelUnit, norms: List[ChannelSlice],
                 layers: Dict[str, Layer]) -> Tensor:
    """Number (C, ) the groups of channels that are linked by what GroupNorms normalise jointly."""
    numbers = torch.arange(unit.size)
    for item in norms:
        norm = layers[item.module]
        size = norm.num_channels // norm.num_groups
        groups = item.channels // size
        if bool((groups.bincount(minlength=norm.num_groups) % size).any()):
            raise PruningError(f'not all channels of a group of the GroupNorm {item.module} are '
                               'coupled with it')
        for group in groups.unique().tolist():
            members = numbers[item.unit_index[groups == group]]
            numbers[torch.isin(numbers, members)] = members.min()
    return numbers.unique(return_inverse=True)[1]


def _conv_groups(unit: ChannelUnit, convs: List[ChannelSlice],
                 layers: Dict[str, Layer]) -> Optional[Tensor]:
    """Number (C, ) the channels by their group in the grouped convolutions, -1 for no group."""
    found = None
    for item in convs:
        conv = layers[item.module]
        channels = num_channels(conv, item.side)
        if len(item.channels.unique()) < channels or len(item.unit_index.unique()) < channels:
            raise PruningError(f'it has only some channels of the grouped convolution '
                               f'{item.module}')
        numbers = torch.full((unit.size, ), -1)
        numbers[item.unit_index] = item.channels // (channels // conv.groups)
        if found is not None and not torch.equal(found, numbers):
            raise PruningError(f'the grouped convolutions {convs[0].module} and {item.module} '
                               'divide its channels differently')
        found = numbers
    return found

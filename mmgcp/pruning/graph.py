# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From a model to its channel units; the only module that knows Torch-Pruning.

Torch-Pruning's `DependencyGraph <https://arxiv.org/abs/2301.12900>`_ tells which channels
of which layers have to go together. What is removed, and how, is decided elsewhere.
"""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.attention.modules import taken_out
from mmgcp.errors import PruningError
from mmgcp.nn.forward import random_image, run_as_tensors
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

from .constraints import constrain
from .tracing import Observer, flatten_tensors, from_front, splits_rightly, traceable
from .units import ChannelSlice, ChannelUnit

PREDICTIONS = 'its outputs are the predictions'
ENDLESS = 'Torch-Pruning finds no end of what is coupled with it'
# Of one channel unit; in all detectors tested the most are 120 and, in a Faster R-CNN, 600 000
MAX_OPERATIONS = 2000
MAX_INDICES = 1_000_000


class _EndlessError(Exception):
    """Torch-Pruning finds no end of what is coupled with a layer."""


def find_units(
        model: nn.Module,
        input_shape: Sequence[int] = (3, 128, 128)
) -> Tuple[List[ChannelUnit], Dict[str, str]]:
    """Find the units of channels that can only be removed together.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``.
        input_shape (Sequence[int]): Shape (C, H, W) of the image to trace with.

    Returns:
        tuple: The prunable units in the order of the model's layers, and the layers
        that cannot be pruned with the reason.

    Raises:
        PruningError: The model cannot be traced, or Torch-Pruning is not installed.
    """
    torch_pruning = _import_torch_pruning()
    with taken_out(model), traceable(model) as modes, _repaired(torch_pruning):
        graph, observer, output_fns = _build_graph(torch_pruning, model, input_shape, modes)
        predictions = _prediction_layers(graph, output_fns)
        found: List[ChannelUnit] = []
        skipped = {graph._module2name[module]: PREDICTIONS
                   for module in predictions}
        covered: Dict[nn.Module, Set[int]] = {}
        for name, module in model.named_modules():
            if (isinstance(module, WEIGHT_TYPES) and module in graph.module2node
                    and module not in predictions):
                try:
                    found += _unit_rooted_at(graph, name, module, covered)
                except _EndlessError:  # who reads its channels will miss them
                    skipped[name] = ENDLESS
        unclear = _unclear_layers(graph, observer, found)
    units = []
    for unit in found:
        layers = {item.module: find_layer(model, item.module) for item in unit.slices}
        try:
            _check(unit, layers, predictions, unclear)
            units.append(constrain(unit, layers))
        except PruningError as reason:
            for item in unit.side('out'):
                skipped.setdefault(item.module, str(reason))
    return units, skipped


def _import_torch_pruning():
    try:
        import torch_pruning
    except ImportError:
        raise PruningError('pruning needs Torch-Pruning 1.6.1, which is not installed: '
                           'pip install --no-deps torch-pruning==1.6.1') from None
    return torch_pruning


@contextmanager
def _repaired(torch_pruning) -> Iterator[None]:
    """Let Torch-Pruning keep the order of indices, and all roots of each, and come to an end.

    It passes indices that are mapped back through a flatten through a unit, takes each new
    order for news, and needs minutes for a Faster R-CNN. Of an index that belongs to several
    roots it drops all but one, so that these seem to be free of each other. And where it
    takes a reshape for a flatten, indices can grow without end.
    """
    mappings, group = torch_pruning.dependency.index_mapping, torch_pruning.dependency.group.Group
    originals = mappings._FlattenIndexMapping, group.add_dep, group.add_and_merge

    class Ordered(mappings._FlattenIndexMapping):

        def __call__(self, indices):
            if not self.reverse:
                if len(indices) * self._stride > MAX_INDICES:
                    raise _EndlessError
                return super().__call__(indices)
            return list(dict.fromkeys(item._replace(idx=item.idx // self._stride)
                                      for item in indices))

    def add(group, dep, idxs) -> None:
        if len(group) >= MAX_OPERATIONS:
            raise _EndlessError
        originals[1](group, dep, idxs)

    mappings._FlattenIndexMapping, group.add_dep, group.add_and_merge = Ordered, add, add
    try:
        yield
    finally:
        mappings._FlattenIndexMapping, group.add_dep, group.add_and_merge = originals


def _build_graph(torch_pruning, model: nn.Module, input_shape: Sequence[int],
                 modes: Dict[nn.Module, bool]):
    outputs: List[Tensor] = []
    observer = Observer(model)

    def forward(model: nn.Module, image: Tensor) -> List[Tensor]:
        # Torch-Pruning has called eval(), with which backbones freeze their stages again
        for module, mode in modes.items():
            module.training = mode
        for param in model.parameters():
            param.requires_grad_(True)
        with observer:
            outputs.extend(flatten_tensors(run_as_tensors(model, image)))
        return outputs

    graph = torch_pruning.DependencyGraph()
    graph.REGISTERED_PRUNERS[torch_pruning.ops.OPTYPE.SLICE].get_out_channels = _sliced_channels
    concats = graph.REGISTERED_PRUNERS[torch_pruning.ops.OPTYPE.CONCAT]
    concats.get_in_channels = concats.get_out_channels = (
        lambda operation: observer.concatenated.get(graph.module2node[operation].grad_fn))
    try:
        with torch.enable_grad():
            graph.build_dependency(
                model, random_image(model, input_shape), forward_fn=forward, verbose=False)
    except Exception as error:  # whatever the model or Torch-Pruning raises
        raise PruningError('the model cannot be traced: '
                           f'{type(error).__name__}: {error}') from error
    return graph, observer, [output.grad_fn for output in outputs]


def _channels_before_slice(operation) -> Optional[int]:
    """The channels that a slice cuts; None if it cuts another dimension."""
    sizes = operation.grad_fn._saved_self_sym_sizes
    return sizes[1] if len(sizes) > 1 and from_front(operation.dim, len(sizes)) == 1 else None


def _sliced_channels(operation) -> Optional[int]:
    """The channels that a slice lets through; None if it cuts another dimension."""
    channels = _channels_before_slice(operation)
    if channels is None:
        return None
    start, end = (min(bound, channels) for bound in (operation.start, operation.end))
    return (end - start + operation.step - 1) // operation.step


def _prediction_layers(graph, output_fns: List[object]) -> Set[nn.Module]:
    """The last layers with weights before each output."""
    return _nearest_layers([node for node in graph.module2node.values()
                            if not node.outputs or node.grad_fn in output_fns])


def _nearest_layers(nodes: Iterable) -> Set[nn.Module]:
    """The layers with weights among some nodes, and the next ones before the others."""
    found, seen, pending = set(), set(), list(nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.module, WEIGHT_TYPES):
            found.add(node.module)
        else:
            pending.extend(node.inputs)
    return found


def _unit_rooted_at(graph, name: str, module: nn.Module,
                 covered: Dict[nn.Module, Set[int]]) -> List[ChannelUnit]:
    """The unit, if any, rooted at the output channels of a layer that are in none so far."""
    pruner = graph.get_pruner_of_module(module)
    channels = [index for index in range(pruner.get_out_channels(module))
                if index not in covered.get(module, ())]
    if not channels:
        return []
    group = graph.get_pruning_group(module, pruner.prune_out_channels, channels)
    root_numbers = {channel: number for number, channel in enumerate(channels)}
    # (layer, side) -> pairs of a channel of the layer and one of the unit, each once
    pairs: Dict[Tuple[str, str], Dict[Tuple[int, int], None]] = {}
    for item in group:
        target = item.dep.target
        if not isinstance(target.module, (nn.Module, nn.Parameter)) or not _has_weights(target):
            continue
        is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if is_out:
            covered.setdefault(target.module, set()).update(item.idxs)
        found = zip(item.idxs, [root_numbers[root] for root in item.root_idxs])
        key = (_name_of(graph, target), 'out' if is_out else 'in')
        pairs.setdefault(key, {}).update(dict.fromkeys(found))
    slices = tuple(ChannelSlice(layer, side, *torch.tensor(list(found)).unbind(1))
                   for (layer, side), found in pairs.items())
    return [ChannelUnit(name, len(channels), slices)]


def _has_weights(node) -> bool:
    layer = node.module
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return False
    return (isinstance(layer, nn.Parameter) or bool(channel_counts(layer))
            or any(True for _ in (*layer.parameters(), *layer.buffers())))


def _name_of(graph, node) -> str:
    if isinstance(node.module, nn.Parameter):
        return graph._param_to_name[node.module]
    return graph._module2name[node.module]


def _unclear_layers(graph, observer: Observer,
                    units: List[ChannelUnit]) -> Dict[Tuple[str, str], str]:
    """Sides of layers whose inputs the units do not explain, and of those that these are from.

    Torch-Pruning loses channels on some ways through concatenations.
    """
    known: Dict[Tuple[str, str], Set[int]] = {}
    unclear = {}
    for unit in units:
        reason = _contradiction(graph.model, unit, known)
        if reason:
            unclear.update({(item.module, item.side): reason for item in unit.slices})
    for module, node in graph.module2node.items():
        readers = set()
        if node.grad_fn in observer.with_constants:
            reason = 'it is combined with something that is not the output of a layer'
        elif node.grad_fn in observer.mixing and not _has_weights(node):
            reason = 'its channels are mixed or reordered by something without weights'
        elif _cuts_channels(node) and not splits_rightly(observer.splits.get(node.grad_fn)):
            reason = 'its channels are split by a module that does not say how'
        elif isinstance(module, WEIGHT_TYPES) and not is_depthwise(module):
            name = graph._module2name[module]
            if known.get((name, 'in')) == set(range(num_channels(module, 'in'))):
                continue
            reason = f'it is not clear which layer each input channel of {name} is from'
            readers = {(name, 'in')}
        else:
            continue
        sources = {(graph._module2name[source], 'out') for source in _nearest_layers(node.inputs)}
        if sources:
            unclear.update(dict.fromkeys(sources | readers, reason))
    return unclear


def _contradiction(model: nn.Module, unit: ChannelUnit,
                   known: Dict[Tuple[str, str], Set[int]]) -> str:
    """Why a unit cannot be right, beside those that are known; empty if it can be.

    Args:
        model (nn.Module): The model.
        unit (ChannelUnit): The unit.
        known (dict): Channels of other units by layer and side; gets those of this one.
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


def _cuts_channels(node) -> bool:
    """Whether a node takes some channels out of a feature map."""
    return (type(node.module).__name__ == '_SliceOp'
            and _sliced_channels(node.module) != _channels_before_slice(node.module))


def _check(unit: ChannelUnit, layers: Dict[str, Layer], predictions: Set[nn.Module],
           unclear: Dict[Tuple[str, str], str]) -> None:
    """Raise the reason if a unit has to be left alone."""
    for item in unit.slices:
        layer = layers[item.module]
        if isinstance(layer, nn.Parameter) and not has_channels(layer):
            raise PruningError(f'it is coupled with the parameter {item.module}')
        if layer in predictions and item.side == 'out':
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
    """Whether a convolution makes several channels of each; Torch-Pruning miscounts those."""
    return is_grouped(layer) and layer.groups in (layer.in_channels, layer.out_channels)

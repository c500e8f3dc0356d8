# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From a model to its coupled channel sets; the only module that knows Torch-Pruning.

Torch-Pruning's `DependencyGraph <https://arxiv.org/abs/2301.12900>`_ tells which channels
of which layers have to go together. What is removed, and how, is decided elsewhere.
"""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, Sequence, Set, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm, _InstanceNorm
from torch import Tensor

from mmgcp.utils.forward import random_image

from .structures import ChannelSlice, CoupledChannels, PruningError
from .surgery import num_channels

ROOT_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def find_coupled_channels(
        model: nn.Module,
        input_shape: Sequence[int] = (3, 128, 128)
) -> Tuple[List[CoupledChannels], Dict[str, str]]:
    """Find the sets of channels that can only be removed together.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``.
        input_shape (Sequence[int]): Shape (C, H, W) of the image to trace with.

    Returns:
        tuple: The prunable sets in the order of the model's layers, and the layers
        that cannot be pruned with the reason.

    Raises:
        PruningError: The model cannot be traced, or Torch-Pruning is not installed.
    """
    with traceable(model) as modes:
        graph, output_fns = _build_graph(model, input_shape, modes)
        predictions = _prediction_layers(graph, output_fns)
        found: List[CoupledChannels] = []
        skipped = {graph._module2name[module]: 'its outputs are the predictions'
                   for module in predictions}
        covered: Dict[nn.Module, Set[int]] = {}
        for name, module in model.named_modules():
            if (isinstance(module, ROOT_TYPES) and module in graph.module2node
                    and module not in predictions):
                found += _coupled_set(graph, name, module, covered)
        unclear = _unclear_layers(graph, found)
    coupled_sets = []
    modules = dict(model.named_modules())
    for coupled in found:
        reason = _reason_to_skip(coupled, modules, predictions, unclear)
        if reason:
            skipped.update((item.module, reason) for item in coupled.side('out')
                           if item.module not in skipped)
        else:
            coupled_sets.append(coupled)
    return coupled_sets, skipped


@contextmanager
def traceable(model: nn.Module) -> Iterator[Dict[nn.Module, bool]]:
    """Put a model in train mode with fixed normalisation and all gradients on, then restore it.

    Yields:
        dict: The mode (training or not) of each module meanwhile.
    """
    training = {module: module.training for module in model.modules()}
    frozen = {param for param in model.parameters() if not param.requires_grad}
    model.train()
    for module in model.modules():
        if isinstance(module, (_BatchNorm, _InstanceNorm, nn.Dropout)):
            module.training = False
    for param in model.parameters():
        param.requires_grad_(True)
    try:
        yield {module: module.training for module in model.modules()}
    finally:
        for module, mode in training.items():
            module.training = mode
        for param in model.parameters():
            param.requires_grad_(param not in frozen)


def flatten_tensors(outputs) -> List[Tensor]:
    """Return all tensors of nested lists, tuples and dictionaries."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, (list, tuple)):
        return [tensor for item in outputs for tensor in flatten_tensors(item)]
    return []


def _build_graph(model: nn.Module, input_shape: Sequence[int], modes: Dict[nn.Module, bool]):
    try:
        import torch_pruning
    except ImportError:
        raise PruningError('pruning needs Torch-Pruning 1.6.1, which is not installed: '
                           'pip install --no-deps torch-pruning==1.6.1') from None

    outputs: List[Tensor] = []

    def forward(model: nn.Module, image: Tensor) -> List[Tensor]:
        # Torch-Pruning has called eval(), with which backbones freeze their stages again
        for module, mode in modes.items():
            module.training = mode
        for param in model.parameters():
            param.requires_grad_(True)
        outputs.extend(flatten_tensors(model(image, mode='tensor')))
        return outputs

    try:
        with torch.enable_grad():
            graph = torch_pruning.DependencyGraph().build_dependency(
                model, random_image(model, input_shape), forward_fn=forward, verbose=False)
    except Exception as error:  # whatever the model or Torch-Pruning raises
        raise PruningError('the model cannot be traced: '
                           f'{type(error).__name__}: {error}') from error
    return graph, [output.grad_fn for output in outputs]


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
        if isinstance(node.module, ROOT_TYPES):
            found.add(node.module)
        else:
            pending.extend(node.inputs)
    return found


def _coupled_set(graph, name: str, module: nn.Module,
                 covered: Dict[nn.Module, Set[int]]) -> List[CoupledChannels]:
    """The set, if any, rooted at the output channels of a layer that are in none so far."""
    pruner = graph.get_pruner_of_module(module)
    channels = [index for index in range(pruner.get_out_channels(module))
                if index not in covered.get(module, ())]
    if not channels:
        return []
    group = graph.get_pruning_group(module, pruner.prune_out_channels, channels)
    root_numbers = {channel: number for number, channel in enumerate(channels)}
    slices = []
    for item in group:
        target = item.dep.target
        if not isinstance(target.module, (nn.Module, nn.Parameter)) or not _has_weights(target):
            continue
        is_out = graph.is_out_channel_pruning_fn(item.dep.handler)
        if is_out:
            covered.setdefault(target.module, set()).update(item.idxs)
        slices.append(
            ChannelSlice(
                module=_name_of(graph, target),
                side='out' if is_out else 'in',
                channels=torch.tensor(item.idxs, dtype=torch.long),
                roots=torch.tensor([root_numbers[root] for root in item.root_idxs])))
    return [CoupledChannels(name, len(channels), tuple(slices))]


def _has_weights(node) -> bool:
    return (isinstance(node.module, (nn.Parameter, _BatchNorm))
            or any(True for _ in node.module.parameters()))


def _name_of(graph, node) -> str:
    if isinstance(node.module, nn.Parameter):
        return graph._param_to_name[node.module]
    return graph._module2name[node.module]


def _unclear_layers(graph,
                    coupled_sets: List[CoupledChannels]) -> Dict[Tuple[str, str], str]:
    """Sides of layers whose inputs the sets do not explain, and of those that these are from.

    Torch-Pruning loses channels on some ways through split, chunk and concatenation.
    """
    known: Dict[str, Set[int]] = {}
    for coupled in coupled_sets:
        for item in coupled.side('in'):
            known.setdefault(item.module, set()).update(item.channels.tolist())
    unclear = {}
    for module, node in graph.module2node.items():
        readers = set()
        if _adds_untraced(node):
            reason = 'something that is not the output of a layer is added to it'
        elif isinstance(module, ROOT_TYPES) and getattr(module, 'groups', 1) == 1:
            name = graph._module2name[module]
            if known.get(name) == set(range(num_channels(module, 'in'))):
                continue
            reason = f'it is not clear which layer each input channel of {name} is from'
            readers = {(name, 'in')}
        else:
            continue
        sources = {(graph._module2name[source], 'out') for source in _nearest_layers(node.inputs)}
        if sources:
            unclear.update(dict.fromkeys(sources | readers, reason))
    return unclear


def _adds_untraced(node) -> bool:
    """Whether a node adds what is no layer's output, such as the image, to its input."""
    name = type(node.grad_fn).__name__
    return (name in ('AddBackward0', 'SubBackward0')
            and any(function is None for function, _ in node.grad_fn.next_functions))


def _reason_to_skip(coupled: CoupledChannels, modules: Dict[str, nn.Module],
                    predictions: Set[nn.Module], unclear: Dict[Tuple[str, str], str]) -> str:
    """Why a set is left alone, or an empty string."""
    for item in coupled.slices:
        module = modules.get(item.module)
        if module is None:
            return f'it is coupled with the parameter {item.module}'
        if module in predictions and item.side == 'out':
            return f'it is coupled with the prediction layer {item.module}'
        if getattr(module, 'groups', 1) > 1:
            return f'it is coupled with the grouped convolution {item.module}'
        if not isinstance(module, (*ROOT_TYPES, _BatchNorm)):
            return f'it is coupled with the {type(module).__name__} {item.module}'
        if (item.module, item.side) in unclear:
            return unclear[item.module, item.side]
        if int(item.channels.max()) >= num_channels(module, item.side):
            return f'it is not clear which of its channels {item.module} reads'
        if len(item.channels.unique()) != len(item.channels):
            return f'several of its channels are tied to each other in {item.module}'
    return ''

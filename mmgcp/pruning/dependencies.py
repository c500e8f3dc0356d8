# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Torch-Pruning's dependency graph with repairs; the only module that imports Torch-Pruning.

`DepGraph (arXiv 2301.12900) <https://arxiv.org/abs/2301.12900>`_ follows the channels of a
layer through everything that is computed from them. Subclasses repair what Torch-Pruning 1.6.1
gets wrong; nothing in the installed package is changed.
"""
from typing import Container, Dict, Iterable, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor
from torch_pruning import DependencyGraph
from torch_pruning._helpers import _HybridIndex as Index
from torch_pruning.dependency import Node
from torch_pruning.dependency.index_mapping import _FlattenIndexMapping, _GQAIndexMapping
from torch_pruning.ops import OPTYPE

from mmgcp.errors import PruningError
from mmgcp.nn.forward import flatten_tensors, random_image, run_as_tensors
from mmgcp.nn.hooks import hooks_kept
from mmgcp.nn.layers import WEIGHT_TYPES, channel_counts

from .tracing import Observer, from_front, traceable

# The most steps and channels to follow for one channel unit. The detectors tested need up to
# 120 steps and, for a Faster R-CNN, 600 000 channels; maps that are concatenated with themselves
# several times need thousands of steps.
MAX_STEPS = 20_000
MAX_CHANNELS = 1_000_000

# Layer and side -> pairs (channel of the layer, index in the unit), each once, in order
Reached = Dict[Tuple[str, str], Dict[Tuple[int, int], None]]
ENDLESS = 'Torch-Pruning finds no end of what is coupled with it'


class ChannelGraph(DependencyGraph):
    """The dependency graph of a detector, traced with an image (C, H, W) of noise.

    The detector is left as it was. Repairs:

    - Torch-Pruning guesses how many channels slices and concatenations return. Here slices say
      it themselves, and the observer has recorded it for concatenations.
    - Where a layer's channel belongs to several channels of the unit, it keeps only one of
      these, so that the others seem independent. Here all are kept.
    - It follows a reshape that it misunderstands forever. Here there are limits.
    - It takes each expand in five dimensions for the repeated heads of a transformer, and fails
      or loses the channels. Here an expand keeps the channels as they are.
    - On the way back through a flatten it shuffles them, see :class:`OrderedFlattening`.
    """

    def __init__(self, model: nn.Module, input_shape: Sequence[int]):
        super().__init__()
        self.observer = Observer(model)
        self._outputs: List[Tensor] = []
        self._leading: Set[object] = set()

        def forward(model: nn.Module, image: Tensor) -> List[Tensor]:
            # Torch-Pruning has called eval(), in which backbones freeze their stages
            with traceable(model), self.observer:
                self._outputs = flatten_tensors(run_as_tensors(model, image))
            unread, self._leading = self.observer.find_unread(self._outputs)
            return [*self._outputs, *unread]

        with torch.enable_grad(), traceable(model), hooks_kept(model):
            self.build_dependency(
                model, random_image(model, input_shape), forward_fn=forward, verbose=False)
        for node in self.module2node.values():
            for dependency in node.dependencies:
                dependency.index_mapping = list(map(_repaired, dependency.index_mapping))

    def get_out_channels(self, module_or_node) -> Optional[int]:
        """Return how many channels a node returns; None if that depends on its inputs."""
        node = self.module2node.get(module_or_node, module_or_node)
        if node.type == OPTYPE.SLICE:
            return _slice_channels(node)[1]
        if node.type == OPTYPE.CONCAT:
            return self.get_in_channels(node)
        return super().get_out_channels(node)

    def get_in_channels(self, module_or_node) -> Optional[int]:
        """Return how many channels a node reads; None if that depends on its inputs."""
        node = self.module2node.get(module_or_node, module_or_node)
        if node.type == OPTYPE.CONCAT:
            return self.observer.concatenated.get(node.grad_fn)
        return super().get_in_channels(node)

    def name_of(self, module) -> str:
        """Return the name of a module or parameter in the model."""
        names = self._param_to_name if isinstance(module, nn.Parameter) else self._module2name
        return names[module]

    def prediction_layers(self) -> List[str]:
        """List the last layers with weights before each output of the model."""
        outputs = {output.grad_fn for output in self._outputs}
        return self.nearest_layers(
            node for node in self.module2node.values()
            if node.grad_fn in outputs or not node.outputs and node.grad_fn in self._leading)

    def unread_layers(self) -> List[str]:
        """List the last layers that run, but whose outputs lead to no output of the model."""
        nodes = [node for node in self.module2node.values()
                 if not node.outputs and node.grad_fn not in self._leading]
        return self.nearest_layers(nodes, self._leading)

    def nearest_layers(self, nodes: Iterable[Node], but: Container[object] = ()) -> List[str]:
        """List the layers with weights among nodes, and those nearest before the other nodes.

        What leads to the results of nodes ``but`` of the autograd graph is not looked at.
        """
        found, seen, pending = {}, set(), list(nodes)
        while pending:
            node = pending.pop()
            if node in seen or node.grad_fn in but:
                continue
            seen.add(node)
            if isinstance(node.module, WEIGHT_TYPES):
                found[self.name_of(node.module)] = None
            else:
                pending.extend(node.inputs)
        return list(found)

    @staticmethod
    def has_weights(node: Node) -> bool:
        """Whether a node is a parameter, or a layer with parameters or buffers for channels."""
        layer = node.module
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            return False
        return (isinstance(layer, nn.Parameter) or bool(channel_counts(layer))
                or any(True for _ in (*layer.parameters(), *layer.buffers())))

    @staticmethod
    def cuts_channels(node: Node) -> bool:
        """Whether a node takes some channels out of a feature map."""
        return node.type == OPTYPE.SLICE and len(set(_slice_channels(node))) > 1

    def follow(self, layer: nn.Module, channels: Sequence[int]) -> Reached:
        """Find all channels that have to be removed with output channels of a layer.

        The channels are numbered by the unit. Raises a PruningError if there seems to be no end
        of what is coupled with them.
        """
        removal = self.get_pruner_of_module(layer).prune_out_channels
        indices = [Index(channel, number) for number, channel in enumerate(channels)]
        steps = [(self.module2node[layer], removal, indices)]
        pending = list(steps)
        done = {steps[0][:2]: [indices]}  # node and what is removed of it -> their indices
        visited, followed = set(), 0
        while pending:
            source, trigger, indices = pending.pop()
            visited.add(source)
            for dependency in source.dependencies:
                if not dependency.is_triggered_by(trigger):
                    continue
                mapped = indices
                for mapping in dependency.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
                before = done.setdefault((dependency.target, dependency.handler), [])
                if not mapped or dependency.target in visited and mapped in before:
                    continue
                followed += len(mapped)
                if len(steps) == MAX_STEPS or followed > MAX_CHANNELS:
                    raise PruningError(ENDLESS)
                before.append(mapped)
                steps.append((dependency.target, dependency.handler, mapped))
                pending.append(steps[-1])
        reached: Reached = {}
        for node, removal, indices in steps:
            if self.has_weights(node):
                side = 'out' if self.is_out_channel_pruning_fn(removal) else 'in'
                pairs = reached.setdefault((self.name_of(node.module), side), {})
                pairs.update(dict.fromkeys(indices))
        return reached


class OrderedFlattening(_FlattenIndexMapping):
    """Maps channels to the elements of a flattened map, or back.

    On the way back Torch-Pruning passes the channels through a set. Their order changes, it
    takes each new order for other channels, and a Faster R-CNN takes minutes.
    """

    def __call__(self, indices: List[Index]) -> List[Index]:
        """Map pairs of a channel and its index in the unit."""
        if self.reverse:
            return list(dict.fromkeys(Index(index.idx // self._stride, index.root_idx)
                                      for index in indices))
        if len(indices) * self._stride > MAX_CHANNELS:
            raise PruningError(ENDLESS)
        return super().__call__(indices)


def _repaired(mapping):
    """Return what replaces one of Torch-Pruning's mappings of channels, None for identity."""
    if isinstance(mapping, _FlattenIndexMapping):
        return OrderedFlattening(mapping._stride, mapping.reverse)
    return None if isinstance(mapping, _GQAIndexMapping) else mapping


def _slice_channels(node: Node) -> Tuple[Optional[int], Optional[int]]:
    """Count the channels before and behind a slice; None if it cuts another dimension."""
    sizes, piece = node.module.grad_fn._saved_self_sym_sizes, node.module
    if len(sizes) < 2 or from_front(piece.dim, len(sizes)) != 1:
        return None, None
    start, end = (min(bound, sizes[1]) for bound in (piece.start, piece.end))
    return sizes[1], (end - start + piece.step - 1) // piece.step

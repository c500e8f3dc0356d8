# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running a model so that Torch-Pruning understands its autograd graph."""
from contextlib import contextmanager
from itertools import accumulate
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _InstanceNorm
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmgcp.nn.temporarily import checkpointing_off, modes, requiring_grad
from mmgcp.nn.training_loss import QUIET_TYPES

from .attributes import SPLITTING_TYPES

SPLITS = {torch.split, torch.chunk, torch.tensor_split, Tensor.split, Tensor.chunk,
          Tensor.tensor_split, torch.functional.split}
ARITHMETIC = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ('add', 'sub', 'mul', 'div', 'true_divide', 'add_', 'sub_', 'mul_', 'div_',
                 '__add__', '__radd__', '__iadd__', '__sub__', '__rsub__', '__isub__', '__mul__',
                 '__rmul__', '__imul__', '__truediv__', '__rtruediv__', '__itruediv__', 'maximum',
                 'minimum', 'max', 'min', 'lerp', 'where', 'addcmul', 'addcdiv')
    if hasattr(owner, name)
}
# Nodes of the autograd graph whose outputs depend on several channels; what torch cannot
# differentiate, as channel_shuffle before 2.2, might do anything
MIXING = ('NotImplemented', 'ChannelShuffleBackward0', 'NativeGroupNormBackward0',
          'NativeLayerNormBackward0')
# Nodes that act on a dimension, but keep the order of channels and ignore channels of zeros
KEEPING = ('CatBackward0', 'StackBackward0', 'SliceBackward0', 'PermuteBackward0', 'SumBackward1',
           'LinalgVectorNormBackward0', 'NormBackward1', 'SqueezeBackward1', 'UnsqueezeBackward0')


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Put a model in train mode with fixed normalisation and all gradients on, for a while.

    Nothing is dropped, and nothing is hidden by gradient checkpointing.
    """
    with modes(model, _trains), requiring_grad(model, model.parameters()), checkpointing_off():
        yield


def _trains(module: nn.Module) -> bool:
    """Whether a module may be in train mode: not if that changes statistics, or drops anything.

    What drops has neither layers nor weights.
    """
    return not isinstance(module, (*QUIET_TYPES, _InstanceNorm)) and any(
        True for _ in (*module.children(), *module.parameters(), *module.buffers()))


class Observer(TorchFunctionMode):
    """Records what a model computes that the autograd graph does not tell.

    It also replaces split and chunk by narrow, which Torch-Pruning follows. To be used as a
    context manager around a run of the model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # Nodes of the graph that combine a feature map with a tensor that has channels of its own
        # but is no layer's output, such as the image
        self.with_constants: Set[object] = set()
        # Nodes that reorder channels, or whose outputs depend on several channels
        self.mixing: Set[object] = set()
        # Type of the module that runs a node that takes channels out of a feature map
        self.splits: Dict[object, Optional[type]] = {}
        # Everything that has been computed, in order
        self._computed: List[Tensor] = []
        # Channels of the result of a node that concatenates feature maps
        self.concatenated: Dict[object, int] = {}
        self._running: List[nn.Module] = []  # the modules that are running, innermost last
        self._handles: List = []

    def __enter__(self):
        def enter(module, _) -> None:
            self._running.append(module)

        def leave(*_) -> None:
            self._running.pop()

        for module in self.model.modules():
            self._handles += [module.register_forward_pre_hook(enter),
                              module.register_forward_hook(leave)]
        return super().__enter__()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func in SPLITS:
            outputs = _narrowed(args[0] if args else kwargs.get('input', kwargs.get('tensor')),
                                outputs)
        for output in outputs if isinstance(outputs, (list, tuple)) else [outputs]:
            if isinstance(output, Tensor) and output.grad_fn is not None:
                self._computed.append(output)
                self._record(func, (*args, *(kwargs or {}).values()), output)
        return outputs

    def find_unread(self, outputs: Iterable[Tensor]) -> Tuple[List[Tensor], Set[object]]:
        """Find what has been computed, but leads to none of the outputs of the model.

        Returns the last results of such computations, and the nodes of the graph that lead to
        outputs.
        """
        reached: Set[object] = set()
        _add_nodes(reached, [output.grad_fn for output in outputs])
        leading, unread = set(reached), []
        for result in reversed(self._computed):
            if result.grad_fn not in reached:
                unread.append(result)
                _add_nodes(reached, [result.grad_fn])
        self._computed.clear()
        return unread, leading

    def _record(self, func, operands: Sequence, output: Tensor) -> None:
        node, name = output.grad_fn, type(output.grad_fn).__name__
        if func in ARITHMETIC and any(_is_constant(operand, output) for operand in operands):
            self.with_constants.add(node)
        before = operands[0] if operands else None
        if (isinstance(before, Tensor) and before is not output
                and _mixes_channels(node, before, output)):
            self.mixing.add(node)
        if name == 'SliceBackward0' and self._running:
            self.splits[node] = type(self._running[-1])
        if name == 'CatBackward0' and output.dim() > 1:
            self.concatenated[node] = output.shape[1]
            if any(source is None for source, _ in node.next_functions):
                self.with_constants.add(node)


def _add_nodes(reached: Set[object], nodes: Iterable[object]) -> None:
    """Add nodes of the autograd graph, and all that lead to them."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node is not None and node not in reached:
            reached.add(node)
            pending.extend(source for source, _ in node.next_functions)


def splits_rightly(kind: Optional[type]) -> bool:
    """Whether modules of a type still split channels correctly after pruning."""
    return kind is not None and issubclass(kind, tuple(SPLITTING_TYPES))


def from_front(dim: int, dims: int) -> int:
    """Count a dimension that autograd has saved from the front; it saves -1 as 2**64 - 1."""
    return dim if dim < dims else dim - 2**64 + dims


def _narrowed(tensor: Tensor, pieces: List[Tensor]) -> List[Tensor]:
    """Return the pieces of a tensor, each taken out with narrow."""
    dims = [dim for dim in range(tensor.dim()) if pieces[0].shape[dim] != tensor.shape[dim]]
    if not dims:
        return pieces
    sizes = [piece.shape[dims[0]] for piece in pieces]
    return [tensor.narrow(dims[0], start, size)
            for start, size in zip(accumulate([0, *sizes]), sizes)]


def _mixes_channels(node, before: Tensor, after: Tensor) -> bool:
    """Whether a node does more along dimension 1 than to process each channel by itself."""
    name = type(node).__name__
    if name in KEEPING or before.dim() < 2:
        return False
    if name == 'IndexBackward0':
        return any(index is not None for index in node._saved_indices[1:2])
    if 'View' in name or 'Reshape' in name:  # Torch-Pruning handles those to and from vectors
        return before.dim() > 2 and after.dim() > 2 and before.shape[1] != after.shape[1]
    dims = getattr(node, '_saved_dims', getattr(node, '_saved_dim', ()))
    dims = dims if isinstance(dims, (tuple, list)) else (dims, )
    return name in MIXING or 1 in [from_front(dim, before.dim()) for dim in dims]


def _is_constant(operand, output: Tensor) -> bool:
    """Whether an operand has channels of its own that no layer computes."""
    if (not isinstance(operand, Tensor) or operand.requires_grad or operand.dtype == torch.bool
            or output.dim() < 2):
        return False
    dim = 1 - output.dim()  # of the channels, counted from the end
    return operand.dim() >= -dim and operand.shape[dim] > 1

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Removing channels for a while: what a model computes without them, and taking changes back."""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import eval_mode, random_image, run_as_tensors
from mmgcp.nn.hooks import hooked
from mmgcp.nn.layers import find_layer

from .surgery import gather_channels
from .tracing import flatten_tensors
from .units import ChannelUnit


@contextmanager
def channels_off(model: nn.Module, units: Iterable[ChannelUnit],
                 removed: Dict[str, Tensor]) -> Iterator[None]:
    """Let a model compute with channels set to zero, in the layers that make and read them.

    Args:
        model (nn.Module): The model.
        units (Iterable[ChannelUnit]): Its channel units.
        removed (dict[str, Tensor]): The channels, by name of the unit.
    """
    handles = []
    for (name, side), channels in gather_channels(units, removed).items():
        layer = find_layer(model, name)
        if isinstance(layer, nn.Parameter):
            continue  # who reads the sum or the product does not see these channels
        dim = -1 if isinstance(layer, nn.Linear) else 1
        if side == 'out':  # which is the layer's own, unlike what others may read, too
            handles.append(layer.register_forward_hook(
                lambda _, __, output, dim=dim, channels=channels:
                output.index_fill_(dim, channels.to(output.device), 0)))
        else:
            handles.append(layer.register_forward_pre_hook(
                lambda _, args, dim=dim, channels=channels:
                (args[0].index_fill(dim, channels.to(args[0].device), 0), *args[1:])))
    with hooked(handles):
        yield


@torch.no_grad()
def raw_predictions(model: nn.Module, shape: Sequence[int]) -> List[Tensor]:
    """Run a model in eval mode on an image of noise of shape (C, H, W)."""
    with eval_mode(model):
        return flatten_tensors(run_as_tensors(model, random_image(model, shape)))


def check_same_predictions(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Raise a PruningError unless predictions agree up to rounding errors."""
    same = len(expected) == len(found)
    for before, after in zip(expected, found):
        scale = 1 + float(before.abs().nan_to_num(posinf=0).max()) if before.numel() else 1.
        same = same and before.shape == after.shape and torch.allclose(
            before, after, rtol=0, atol=1e-3 * scale, equal_nan=True)
    if not same:
        raise PruningError('the pruned model does not compute what the original does without '
                           'the removed channels, and has been restored: does a forward of it '
                           'depend on channel counts in a way that mmgcp does not know? See '
                           'register_attribute_rule in mmgcp/pruning/attributes.py')


class Snapshot:
    """What surgery and compensation change in a model, without copies of large weights.

    Args:
        model (nn.Module): The model.
        weights (bool): Copy large weights, too, which training changes. Defaults to False.
    """

    def __init__(self, model: nn.Module, weights: bool = False):
        self._modules = [(module, type(module), dict(module.__dict__), dict(module._parameters),
                          dict(module._buffers)) for module in model.modules()]
        params = [param for param in model.parameters() if weights or param.dim() < 2]
        self._values = [(tensor, tensor.detach().clone())
                        for tensor in (*params, *model.buffers())]

    def restore(self) -> None:
        """Take all changes since then back."""
        for module, kind, attributes, parameters, buffers in self._modules:
            module.__class__ = kind
            module.__dict__.update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, value in self._values:
            tensor.data.copy_(value)


@contextmanager
def restored_on_error(model: nn.Module, weights: bool = False) -> Iterator[None]:
    """Take all changes of a model back if anything goes wrong; see :class:`Snapshot`."""
    snapshot = Snapshot(model, weights)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise

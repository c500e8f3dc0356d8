# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Changing modes, gradients and values of a model for a while, and taking changes back."""
from contextlib import contextmanager
from typing import Callable, ContextManager, Iterable, Iterator, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor


@contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put modules in training or eval mode and restore their modes at the end.

    Unlike ``model.train()`` and ``model.eval()`` it bypasses what modules do to their mode by
    themselves, such as backbones that freeze their stages.

    Args:
        model (nn.Module): The model.
        training (Callable): Says of a module whether it shall be in training mode.
    """
    before = {module: module.training for module in model.modules()}
    try:
        for module in before:
            module.training = training(module)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def eval_mode(model: nn.Module) -> ContextManager[None]:
    """Put all modules of a model in eval mode for a while; see :func:`modes`."""
    return modes(model, lambda module: False)


@contextmanager
def requiring_grad(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let some parameters of a model require gradients, and no others, for a while.

    Args:
        model (nn.Module): The model.
        params (Iterable[nn.Parameter]): These parameters.
    """
    chosen, before = set(params), {param: param.requires_grad for param in model.parameters()}
    try:
        for param in before:
            param.requires_grad_(param in chosen)
        yield
    finally:
        for param, flag in before.items():
            param.requires_grad_(flag)


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors the values back that they had, after they were changed in place.

    Args:
        tensors (Iterable[Tensor]): Parameters, buffers or other leaves of the autograd graph.
    """
    saved = _copies(tensors)
    try:
        yield
    finally:
        _put_back(saved)


class Snapshot:
    """A model's structure and values, to take back what surgery and compensation change.

    Large weights are remembered, but not copied, as surgery replaces them instead of changing
    them in place.

    Args:
        model (nn.Module): The model.
        weights (bool): Copy large weights, too, as training changes them in place. Defaults to
            False.
    """

    def __init__(self, model: nn.Module, weights: bool = False):
        self._modules = [(module, type(module), dict(module.__dict__), dict(module._parameters),
                          dict(module._buffers)) for module in model.modules()]
        self._values = _copies([*(param for param in model.parameters()
                                  if weights or param.dim() < 2), *model.buffers()])

    def restore(self) -> None:
        """Make the model what it was, with the very same parameters and buffers."""
        for module, kind, attributes, parameters, buffers in self._modules:
            module.__class__ = kind
            module.__dict__.update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        _put_back(self._values)


@contextmanager
def restored_on_error(model: nn.Module, weights: bool = False) -> Iterator[None]:
    """Restore a model if anything goes wrong; see :class:`Snapshot` for the arguments."""
    snapshot = Snapshot(model, weights)
    try:
        yield
    except BaseException:
        snapshot.restore()
        raise


def _copies(tensors: Iterable[Tensor]) -> List[Tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


@torch.no_grad()
def _put_back(saved: List[Tuple[Tensor, Tensor]]) -> None:
    for tensor, value in saved:
        tensor.copy_(value)

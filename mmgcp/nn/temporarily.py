# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Changing modes, gradients and values of a model for a while, and taking changes back."""
from contextlib import contextmanager
from typing import Any, Callable, ContextManager, Iterable, Iterator, List, Tuple

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor


@contextmanager
def modes(model: nn.Module, training: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Put the modules for which ``training`` is true in training mode, others in eval mode.

    Their modes are restored at the end. Unlike ``model.train()`` and ``model.eval()`` it
    bypasses what modules do to their mode by themselves, such as backbones that freeze their
    stages.
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
    """Let some parameters of a model require gradients, and no others, for a while."""
    chosen, before = set(params), {param: param.requires_grad for param in model.parameters()}
    try:
        for param in before:
            param.requires_grad_(param in chosen)
        yield
    finally:
        for param, flag in before.items():
            param.requires_grad_(flag)


@contextmanager
def checkpointing_off() -> Iterator[None]:
    """Let what runs under gradient checkpointing (``with_cp=True``) run as if it did not.

    Checkpointing keeps its layers out of the autograd graph, and gradients of chosen tensors
    cannot be computed through it.
    """
    owner = torch.utils.checkpoint
    before = owner.checkpoint, owner.CheckpointFunction
    try:
        owner.checkpoint, owner.CheckpointFunction = _run, _Plain
        yield
    finally:
        owner.checkpoint, owner.CheckpointFunction = before


def _run(function: Callable[..., Any], *args: Any, use_reentrant: Any = None,
         preserve_rng_state: Any = None, context_fn: Any = None, determinism_check: Any = None,
         debug: Any = None, early_stop: Any = None, **kwargs: Any) -> Any:
    """Stands in for torch.utils.checkpoint.checkpoint, whose own arguments are dropped."""
    return function(*args, **kwargs)


class _Plain:
    """Stands in for the function by which torch checkpoints, wherever it was imported to."""

    @staticmethod
    def apply(function: Callable[..., Any], _: Any, *args: Any) -> Any:
        """Run a function on its arguments."""
        return function(*args)


@contextmanager
def only_values_change(model: nn.Module) -> Iterator[None]:
    """Let a model be trained, and restore everything but its weights and statistics afterwards.

    That is: modes, gradients, which parameters require them, and the device. In the meantime the
    parameters start without gradients.
    """
    before = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    device = next(model.parameters()).device
    try:
        for param, _, _ in before:
            param.grad = None
        with modes(model, lambda module: module.training):
            yield
    finally:
        model.to(device)
        for param, required, grad in before:
            param.requires_grad_(required)
            param.grad = grad


@contextmanager
def values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Give tensors, such as parameters and buffers, back the values that they had before."""
    saved = _copies(tensors)
    try:
        yield
    finally:
        _put_back(saved)


class Snapshot:
    """A model's structure and values, to take back what surgery and compensation change.

    Large weights are remembered, but not copied, as surgery replaces them instead of changing
    them in place. With ``weights=True`` they are copied, too, for what changes them in place:
    training and reconstruction.
    """

    def __init__(self, model: nn.Module, weights: bool = False):
        self._modules = [(module, type(module), dict(module.__dict__), dict(module._parameters),
                          dict(module._buffers), dict(module._modules))
                         for module in model.modules()]
        self._values = _copies([*(param for param in model.parameters()
                                  if weights or param.dim() < 2), *model.buffers()])

    def restore(self) -> None:
        """Make the model what it was, with the very same modules, parameters and buffers."""
        for module, kind, attributes, parameters, buffers, children in self._modules:
            module.__class__ = kind
            module.__dict__.update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            module._modules.update(children)
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

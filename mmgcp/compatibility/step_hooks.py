# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Hooks before and after an optimizer's step, with every supported version of torch."""
import functools
import types
from typing import Any, Callable, Dict, Optional


def register_step_pre_hook(optimizer: Any, function: Callable[[Any], None]) -> Any:
    """Call ``function(optimizer)`` before each of the optimizer's steps.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        function (Callable): May change gradients in place; its return value is ignored.

    Returns:
        A handle whose ``remove()`` removes the hook.
    """
    if not hasattr(optimizer, 'register_step_pre_hook'):
        return StepPreHook(optimizer, function)

    def hook(optimizer: Any, args: tuple, kwargs: Dict[str, Any]) -> None:
        function(optimizer)  # returning its result would replace the arguments of the step

    return optimizer.register_step_pre_hook(hook)


def register_step_post_hook(optimizer: Any, function: Callable[[Any], None]) -> Any:
    """Call ``function(optimizer)`` after each of the optimizer's steps.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        function (Callable): May change parameters in place.

    Returns:
        A handle whose ``remove()`` removes the hook.
    """
    if not hasattr(optimizer, 'register_step_post_hook'):
        return StepPostHook(optimizer, function)
    return optimizer.register_step_post_hook(
        lambda optimizer, args, kwargs: function(optimizer))


class StepPreHook:
    """A hook before each step with torch 1.13, whose optimizers have no step hooks.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer; its ``step`` is replaced.
        function (Callable): Called with the optimizer.
    """

    def __init__(self, optimizer: Any, function: Callable[[Any], None]) -> None:
        self.function: Optional[Callable[[Any], None]] = function
        self.optimizer = optimizer
        self.original_step = optimizer.step
        # MMEngine's schedulers set an attribute of `step` and check it later: `wraps` copies
        # it. They also expect a bound method.
        self.step = types.MethodType(self._wrap(optimizer.step), optimizer)
        optimizer.step = self.step

    def _wrap(self, step: Callable) -> Callable:

        @functools.wraps(step)
        def hooked_step(optimizer, *args, **kwargs):
            if 'grad_scaler' in kwargs:
                raise RuntimeError('A fused optimizer under AMP needs torch>=2.0 here.')
            return self._run(step, args, kwargs)

        return hooked_step

    def _run(self, step: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        self._call_function()
        return step(*args, **kwargs)

    def _call_function(self) -> None:
        if self.function is not None:
            self.function(self.optimizer)

    def remove(self) -> None:
        """Remove the hook; if ``step`` was wrapped again since, only disable it."""
        self.function = None
        if self.optimizer.step is self.step:
            self.optimizer.step = self.original_step


class StepPostHook(StepPreHook):
    """A hook after each step with torch 1.13; see :class:`StepPreHook`."""

    def _run(self, step: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        result = step(*args, **kwargs)
        self._call_function()
        return result

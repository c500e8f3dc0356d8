# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Looking at what modules read and emit while a model runs, and replacing it."""
from contextlib import contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping

import torch.nn as nn


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end of a block, by the handles that registering them returned."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooks_kept(model: nn.Module) -> Iterator[None]:
    """Remove hooks, at the end of a block, that others have left on modules in the meantime."""
    before = [(hooks, set(hooks)) for module in model.modules()
              for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    try:
        yield
    finally:
        for hooks, known in before:
            for key in set(hooks) - known:
                del hooks[key]


@contextmanager
def on_inputs(model: nn.Module, functions: Mapping[str, Callable[[Any], Any]]) -> Iterator[None]:
    """Call functions with what modules read, each time before they run.

    By name of the module, ``functions`` has a function of its first positional input. What it
    returns replaces the input, unless it is None. Unknown names raise an AttributeError.
    """
    def make_hook(function):
        def hook(_, args):
            replacement = function(args[0])
            return None if replacement is None else (replacement, *args[1:])
        return hook

    modules = [model.get_submodule(name) for name in functions]
    with hooked([module.register_forward_pre_hook(make_hook(function))
                 for module, function in zip(modules, functions.values())]):
        yield


@contextmanager
def on_outputs(model: nn.Module,
               functions: Mapping[str, Callable[[Any, Any], Any]]) -> Iterator[None]:
    """Call functions with what modules read and emit, each time after they ran.

    By name of the module, ``functions`` has a function of its first positional input (None if
    there is none) and its output. What it returns replaces the output, unless it is None.
    Unknown names raise an AttributeError.
    """
    def make_hook(function):
        return lambda _, args, output: function(args[0] if args else None, output)

    modules = [model.get_submodule(name) for name in functions]
    with hooked([module.register_forward_hook(make_hook(function))
                 for module, function in zip(modules, functions.values())]):
        yield


@contextmanager
def recording(model: nn.Module, names: Iterable[str], inputs: bool = False, copy: bool = True,
              then: Callable[[], Any] = lambda: None) -> Iterator[Dict[str, List[Any]]]:
    """Record what modules emit, or their first positional ``inputs``, by name and call by call.

    Copies are recorded, through which gradients flow, as later layers may overwrite a tensor in
    place; modules that return anything but a tensor need ``copy=False``. ``then`` is called
    after each recording, such as :meth:`mmgcp.nn.forward.ShortRuns.seen`. Unknown names raise an
    AttributeError.
    """
    found: Dict[str, List[Any]] = {name: [] for name in names}

    def record(name, *values):
        found[name].append(values[-1].clone() if copy else values[-1])
        then()

    watch = on_inputs if inputs else on_outputs
    with watch(model, {name: partial(record, name) for name in found}):
        yield found

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Watching what layers of a detector put out, and copying it."""
import copy
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Dict, Iterable, Iterator, List, Optional

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.nn.calls import producer_of as maker_of
from mmgcp.nn.calls import set_producer as set_maker
from mmgcp.nn.forward import ShortRuns, run_as_tensors
from mmgcp.nn.hooks import hooked

Outputs = Dict[str, List[Tensor]]


@dataclass
class Call:
    """One time that a layer runs while a detector does.

    Attributes:
        shape (torch.Size): Shape of the output.
        norm (str): Name of the BatchNorm that reads the output, if any.
    """
    shape: torch.Size
    norm: str = ''


@contextmanager
def recording(model: nn.Module, layers: Iterable[str],
              seen: Callable[[], None] = lambda: None, inputs: bool = False) -> Iterator[Outputs]:
    """Record what layers put out, or what they read.

    Args:
        model (nn.Module): The model.
        layers (Iterable[str]): Names of the layers.
        seen (Callable): Called after each tensor. Defaults to nothing.
        inputs (bool): Record the first inputs instead of the outputs. Defaults to False.

    Yields:
        dict[str, list[Tensor]]: The tensors of each layer, call after call. They are copies
        that autograd knows, as activations work in place.
    """
    found: Outputs = {name: [] for name in layers}

    def record(name, tensor):
        found[name].append(tensor.clone())
        seen()

    def watch(name):
        layer = model.get_submodule(name)
        if inputs:
            return layer.register_forward_pre_hook(lambda _, args: record(name, args[0]))
        return layer.register_forward_hook(lambda _, __, output: record(name, output))

    handles = [watch(name) for name in found]
    with hooked(handles):
        yield found


@torch.no_grad()
def watch_calls(model: nn.Module, images: Tensor, layers: Iterable[str]) -> Dict[str, List[Call]]:
    """Run a detector and see when layers run.

    Args:
        model (nn.Module): The detector.
        images (Tensor): Images (N, C, H, W).
        layers (Iterable[str]): Names of the layers.

    Returns:
        dict[str, list[Call]]: What each layer does, call after call.
    """
    calls: Dict[str, List[Call]] = {name: [] for name in layers}

    def see_output(name):
        def hook(_, __, output):
            calls[name].append(Call(output.shape))
            set_maker(output, calls[name][-1])
        return hook

    def see_norm(name):
        def hook(_, args):
            call = maker_of(args[0])
            if call is not None:
                call.norm = name
        return hook

    handles = [model.get_submodule(name).register_forward_hook(see_output(name))
               for name in calls]
    handles += [module.register_forward_pre_hook(see_norm(name))
                for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    with hooked(handles):
        run_as_tensors(model, images)
    return calls


def record_outputs(model: nn.Module, images: Tensor, calls: Dict[str, int]) -> Outputs:
    """Run a detector as far as it takes to know what layers put out.

    Args:
        model (nn.Module): The detector.
        images (Tensor): Images (N, C, H, W).
        calls (dict[str, int]): How often each layer runs, by name.

    Returns:
        dict[str, list[Tensor]]: The outputs of each layer, call after call.
    """
    runs = ShortRuns(model, sum(calls.values()))
    with recording(model, calls, runs.seen) as outputs:
        runs(images)
    return outputs


def record_inputs(model: nn.Module, images: Tensor, calls: Dict[str, int]) -> Optional[Outputs]:
    """Run a detector as far as it takes to know what layers read.

    Args:
        model (nn.Module): The detector. Of its parameters, those that need gradients are
            going to change.
        images (Tensor): Images (N, C, H, W).
        calls (dict[str, int]): How often each layer runs, by name.

    Returns:
        dict[str, list[Tensor]] | None: The first inputs of each layer, call after call; None if
        one of them depends on what is going to change.
    """
    runs = ShortRuns(model, sum(calls.values()))
    with recording(model, calls, runs.seen, inputs=True) as inputs, torch.enable_grad():
        runs(images)
    if any(item.requires_grad for items in inputs.values() for item in items):
        return None
    return inputs


def copy_without_hooks(model: nn.Module) -> nn.Module:
    """Copy a model, without what hooks do to it, and without gradients."""
    duplicate = copy.deepcopy(model)
    for module in duplicate.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return duplicate.requires_grad_(False)

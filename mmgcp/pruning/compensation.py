# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Offset compensation: what a removed channel still emits is folded into its consumers.

A channel whose BatchNorm scale is zero emits the constant act(shift). Its share in the
output of each consumer, a convolution or linear layer, is a constant too (but for the
zero padding at the border), which the consumer's BatchNorm mean or bias can absorb
(GCP-SAD, `arXiv 2306.01526 <https://arxiv.org/abs/2306.01526>`_).
"""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.utils.forward import run_with_hooks

from .structures import CoupledChannels
from .surgery import Channels, gather_channels


class _Consumer(NamedTuple):
    """A layer that reads removed channels."""
    name: str
    channels: Tensor  # (K, ) of its input channels
    values: Tensor  # (K, ) what they carry, NaN if that is not constant
    norm: Optional[_BatchNorm]  # the normalisation that follows it


@torch.no_grad()
def compensate(model: nn.Module, coupled_sets: Iterable[CoupledChannels],
               removed: Dict[str, Tensor],
               input_shape: Sequence[int] = (3, 128, 128)) -> List[str]:
    """Fold the constants of channels that are about to be removed into their consumers.

    The constants are read off one forward pass with the channels' scales set to zero,
    so that sums over shortcuts, pooling, upsampling and concatenation need no rules of
    their own.

    Args:
        model (nn.Module): The model before surgery, changed in place.
        coupled_sets (Iterable[CoupledChannels]): Its coupled sets.
        removed (dict[str, Tensor]): Channels to remove, by name of the set.
        input_shape (Sequence[int]): Shape (C, H, W) of the image.

    Returns:
        list[str]: Consumers that could not absorb everything: an input is not constant,
        or there is neither BatchNorm nor bias.
    """
    channels = gather_channels(coupled_sets, removed)
    with _zeroed_scales(model, channels):
        consumers = _record_consumers(model, channels, input_shape)
    return [consumer.name for consumer in consumers if not _fold(model, consumer)]


@contextmanager
def _zeroed_scales(model: nn.Module, channels: Channels) -> Iterator[None]:
    saved = {}
    for (name, side), indices in channels.items():
        module = model.get_submodule(name)
        if isinstance(module, _BatchNorm) and module.affine:
            saved[module] = module.weight.detach().clone()
            module.weight.data[indices.to(module.weight.device)] = 0
    try:
        yield
    finally:
        for module, weight in saved.items():
            module.weight.data.copy_(weight)


def _record_consumers(model: nn.Module, channels: Channels,
                      input_shape: Sequence[int]) -> List[_Consumer]:
    """Run the model and look at the removed input channels of its layers."""
    inputs: Dict[str, Tensor] = {}
    outputs: Dict[int, str] = {}
    norms: Dict[str, _BatchNorm] = {}
    alive = []  # keeps the ids in ``outputs`` unique

    def look(name):
        def hook(module, args, output):
            dims = (0, 2, 3) if args[0].dim() == 4 else tuple(range(args[0].dim() - 1))
            indices = channels[name, 'in'].to(args[0].device)
            values = args[0].index_select(1 if args[0].dim() == 4 else -1, indices)
            low, high = values.amin(dims), values.amax(dims)
            constant = high - low <= 1e-4 * (1 + high.abs())
            values = ((low + high) / 2).masked_fill(~constant, float('nan'))
            # a layer that is shared must see the same constant every time
            same = name not in inputs or torch.allclose(inputs[name], values, 1e-4, 1e-4)
            inputs[name] = values if same else torch.full_like(values, float('nan'))
            outputs[id(output)] = name
            alive.append(output)
        return hook

    def find_norm(module, args):
        if id(args[0]) in outputs:
            norms[outputs[id(args[0])]] = module

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(find_norm))
        elif (name, 'in') in channels:
            handles.append(module.register_forward_hook(look(name)))
    run_with_hooks(model, input_shape, handles)
    return [_Consumer(name, channels[name, 'in'], values, norms.get(name))
            for name, values in inputs.items()]


def _fold(model: nn.Module, consumer: _Consumer) -> bool:
    """Let a consumer absorb its constants; False if some remain."""
    module = model.get_submodule(consumer.name)
    if isinstance(module, nn.ConvTranspose2d):
        return False  # its output is not constant but repeats with the stride
    weight = module.weight.flatten(2).sum(-1) if module.weight.dim() == 4 else module.weight
    values = consumer.values.nan_to_num(nan=0.)
    offset = weight[:, consumer.channels.to(weight.device)] @ values
    if consumer.norm is not None:
        consumer.norm.running_mean -= offset
    elif module.bias is not None:
        module.bias += offset
    else:
        return not bool(offset.any())
    return not bool(consumer.values.isnan().any())

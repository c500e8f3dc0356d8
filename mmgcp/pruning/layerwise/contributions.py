# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What single channels contribute to the output of a layer."""
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.nn.layers import weight_by_output
from mmgcp.nn.precision import at_least_single
from mmgcp.pruning.units import ChannelSlice


class Entries(NamedTuple):
    """The indices (S, ) of S entries of the output of a convolution or linear layer."""
    images: Tensor
    outputs: Tensor  # channels
    rows: Tensor  # of a linear layer the index in all dimensions between the first and the last
    columns: Tensor  # zeros of a linear layer


def draw_entries(layer: nn.Module, output: Tensor, number: int, removed: Optional[Tensor],
                 generator: torch.Generator) -> Entries:
    """Draw so many random entries of each image of a layer's output, none of removed channels.

    The output is (N, O, H, W), or (N, ..., O) of a linear layer.
    """
    is_linear = isinstance(layer, nn.Linear)
    channels = output.shape[-1] if is_linear else output.shape[1]
    left = torch.ones(channels, dtype=torch.bool)
    if removed is not None:
        left[removed] = False
    left = left.nonzero().flatten()
    height, width = (output[0].numel() // channels, 1) if is_linear else output.shape[2:]
    size = (len(output) * number, )
    entries = (torch.arange(len(output)).repeat_interleave(number),
               left[torch.randint(len(left), size, generator=generator)],
               torch.randint(height, size, generator=generator),
               torch.randint(width, size, generator=generator))
    return Entries(*(item.to(output.device) for item in entries))


def contributions(layer: nn.Module, inputs: Tensor, item: ChannelSlice, size: int,
                  entries: Entries, mean: Optional[Tensor] = None) -> Tensor:
    """Return the contributions (S, C) of a unit's channels to entries of a consumer's output.

    The inputs are (N, I, H, W), or (N, ..., I) of a linear layer, of which the slice belongs to
    the unit; an input that belongs to several of its channels counts in equal parts. What means
    (K, ) of the slice contribute far from the border is subtracted, as it is folded.
    """
    channels, inputs = item.channels.to(inputs.device), at_least_single(inputs)
    if isinstance(layer, nn.Linear):
        read = inputs.flatten(1, -2) if inputs.dim() > 2 else inputs[:, None]
        kernels = layer.weight.detach()[entries.outputs][:, channels].to(inputs)
        found, totals = read[entries.images, entries.rows][:, channels] * kernels, kernels
    else:
        kernels = _kernels(layer, channels, entries.outputs).to(inputs)
        patches = _patches(layer, inputs.index_select(1, channels), entries)
        found, totals = torch.einsum('skyx,syxk->sk', kernels, patches), kernels.sum((2, 3))
        if isinstance(layer, nn.ConvTranspose2d):  # each tap reaches one output of each stride
            totals = totals / (layer.stride[0] * layer.stride[1])
    if mean is not None:
        found = found - mean * totals
    found = found / channels.bincount()[channels]
    return found.new_zeros(len(found), size).index_add(1, item.unit_index.to(found.device), found)


def _kernels(layer: nn.Module, channels: Tensor, outputs: Tensor) -> Tensor:
    """Return the kernels (S, K, h, w) from inputs to outputs, zero between conv groups."""
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    kernels = weight_by_output(layer).detach()[outputs[:, None], (channels % ins)[None]]
    connected = (outputs // outs)[:, None] == (channels // ins)[None]
    return kernels * connected[:, :, None, None]


def _patches(layer: nn.Module, inputs: Tensor, entries: Entries) -> Tensor:
    """Return the inputs (S, h, w, K) that the kernels of entries are multiplied with."""
    images, starts = entries.images[:, None, None], (entries.rows, entries.columns)
    if isinstance(layer, nn.ConvTranspose2d):
        (y, has_row), (x, has_column) = (
            _reaching_inputs(layer, axis, inputs.shape[2 + axis], starts[axis])
            for axis in (0, 1))
        has_input = has_row[:, :, None] & has_column[:, None]
        return inputs[images, :, y[:, :, None], x[:, None]] * has_input[..., None]
    mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
    inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    y, x = (start[:, None] * stride + torch.arange(taps, device=start.device) * dilation
            for start, stride, taps, dilation in zip(
                starts, layer.stride, layer.kernel_size, layer.dilation))
    return inputs[images, :, y[:, :, None], x[:, None]]


def _reaching_inputs(layer: nn.Module, axis: int, size: int,
                     targets: Tensor) -> Tuple[Tensor, Tensor]:
    """Find which inputs of a transposed convolution reach outputs (S, ), along an axis.

    Return the index (S, taps) of the input that each tap connects with each output, and whether
    there is such an input.
    """
    taps = torch.arange(layer.kernel_size[axis], device=targets.device)
    # input i reaches the output i * stride - padding + tap * dilation
    offset = targets[:, None] + layer.padding[axis] - taps * layer.dilation[axis]
    source = torch.div(offset, layer.stride[axis], rounding_mode='floor')
    reached = (offset % layer.stride[axis] == 0) & (source >= 0) & (source < size)
    return source.clamp(0, size - 1), reached

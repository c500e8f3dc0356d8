# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What single channels contribute to the output of a layer."""
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.pruning.units import ChannelSlice


class Entries(NamedTuple):
    """S entries of the output of a layer.

    Attributes:
        images (Tensor): Indices (S, ) in dimension 0.
        outputs (Tensor): Output channels (S, ).
        rows (Tensor): Rows (S, ) of a feature map; of a linear layer the index in all
            dimensions between the first and the last one.
        columns (Tensor): Columns (S, ), 0 of a linear layer.
    """
    images: Tensor
    outputs: Tensor
    rows: Tensor
    columns: Tensor


def draw_entries(layer: nn.Module, output: Tensor, number: int, removed: Optional[Tensor],
                 generator: torch.Generator) -> Entries:
    """Draw entries of an output at random.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer.
        output (Tensor): Its output, (N, O, H, W) or (N, ..., O) of a linear layer.
        number (int): Number of entries of each image.
        removed (Tensor, optional): Output channels of which none are drawn.
        generator (torch.Generator): The source of random numbers.

    Returns:
        Entries: ``N * number`` entries.
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
    """Compute what the channels of a unit contribute to entries of a consumer's output.

    Args:
        layer (nn.Module): The consumer: a convolution, transposed convolution or linear layer.
        inputs (Tensor): Its input, (N, I, H, W) or (N, ..., I) of a linear layer.
        item (ChannelSlice): Which K of its input channels belong to which channels of the unit.
            An input that belongs to several of them counts in equal parts.
        size (int): Number C of channels of the unit.
        entries (Entries): The S entries.
        mean (Tensor, optional): Means (K, ) of the inputs. What they contribute far from the
            border is subtracted, as it is folded.

    Returns:
        Tensor: The contributions (S, C).
    """
    channels = item.channels.to(inputs.device)
    if isinstance(layer, nn.Linear):
        read = inputs.flatten(1, -2) if inputs.dim() > 2 else inputs[:, None]
        kernels = layer.weight.detach()[entries.outputs][:, channels]
        found, totals = read[entries.images, entries.rows][:, channels] * kernels, kernels
    else:
        kernels = _kernels(layer, channels, entries.outputs)
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
    groups, weight = layer.groups, layer.weight.detach()
    ins, outs = layer.in_channels // groups, layer.out_channels // groups
    if isinstance(layer, nn.ConvTranspose2d):
        kernels = weight[channels[None], (outputs % outs)[:, None]]
    else:
        kernels = weight[outputs[:, None], (channels % ins)[None]]
    connected = (outputs // outs)[:, None] == (channels // ins)[None]
    return kernels * connected[:, :, None, None]


def _patches(layer: nn.Module, inputs: Tensor, entries: Entries) -> Tensor:
    """Return the inputs (S, h, w, K) that the kernels of entries are multiplied with."""
    if isinstance(layer, nn.ConvTranspose2d):
        return _patches_of_transposed(layer, inputs, entries)
    mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
    inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    y, x = (start[:, None] * stride + torch.arange(taps, device=start.device) * dilation
            for start, stride, taps, dilation in zip(
                (entries.rows, entries.columns), layer.stride, layer.kernel_size, layer.dilation))
    return inputs[entries.images[:, None, None], :, y[:, :, None], x[:, None]]


def _patches_of_transposed(layer: nn.Module, inputs: Tensor, entries: Entries) -> Tensor:
    y, has_row = _reaching_inputs(layer, 0, inputs.shape[2], entries.rows)
    x, has_column = _reaching_inputs(layer, 1, inputs.shape[3], entries.columns)
    patches = inputs[entries.images[:, None, None], :, y[:, :, None], x[:, None]]
    return patches * (has_row[:, :, None] & has_column[:, None])[..., None]


def _reaching_inputs(layer: nn.Module, axis: int, size: int,
                     targets: Tensor) -> Tuple[Tensor, Tensor]:
    """Find the inputs of a transposed convolution that reach outputs, along an axis.

    Returns:
        tuple: The index (S, taps) of the input that each tap connects with an output, and whether
        there is such an input.
    """
    taps = torch.arange(layer.kernel_size[axis], device=targets.device)
    # input i reaches the output i * stride - padding + tap * dilation
    offset = targets[:, None] + layer.padding[axis] - taps * layer.dilation[axis]
    source = torch.div(offset, layer.stride[axis], rounding_mode='floor')
    reached = (offset % layer.stride[axis] == 0) & (source >= 0) & (source < size)
    return source.clamp(0, size - 1), reached

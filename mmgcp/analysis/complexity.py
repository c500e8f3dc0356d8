# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Parameters and MACs of a detector."""
import math
from dataclasses import dataclass, replace
from typing import Dict, Sequence, Tuple

import torch.nn as nn

from mmgcp.errors import UserError, told
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES, channel_counts


@dataclass(frozen=True)
class ConvStatistics:
    """The quantities that determine the cost of a convolution or linear layer.

    Attributes:
        in_channels (int): Number of input channels.
        out_channels (int): Number of output channels.
        kernel_size (int): Number of weights between an input and an output channel.
        positions (int): Number of positions at which the kernel is applied to an image.
        groups (int): Number of groups of a convolution. Defaults to 1.
    """
    in_channels: int
    out_channels: int
    kernel_size: int
    positions: int
    groups: int = 1

    @property
    def weights(self) -> int:
        """Number of weights, without the bias."""
        return self.in_channels * self.out_channels * self.kernel_size // self.groups

    @property
    def macs(self) -> int:
        """Number of MACs (multiply-accumulate operations) for an image, without the bias."""
        return self.weights * self.positions

    def pruned(self, fewer_in: int, fewer_out: int) -> 'ConvStatistics':
        """Return the statistics with fewer channels; depthwise convolutions lose groups as well."""
        if 1 < self.groups == self.in_channels == self.out_channels:
            left = self.out_channels - fewer_out
            return replace(self, in_channels=left, out_channels=left, groups=left)
        return replace(self, in_channels=self.in_channels - fewer_in,
                       out_channels=self.out_channels - fewer_out)


def record_convs(model: nn.Module, input_shape: Sequence[int]) -> Dict[str, ConvStatistics]:
    """Run a model once and record its convolutions and linear layers.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`.
        input_shape (Sequence[int]): Shape (C, H, W) of the image in pixels.

    Returns:
        dict[str, ConvStatistics]: Statistics by name of the layer. The positions of a layer
        that runs several times (in a head that all levels share) add up; those of a layer
        that does not run in eval mode are zero.

    Raises:
        UserError: The model does not run on an image of this shape.
    """
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, WEIGHT_TYPES)}
    positions = dict.fromkeys(layers, 0)
    try:
        shapes = record_shapes(model, layers, input_shape)
    except Exception as error:  # whatever the model raises
        raise UserError(f'the model does not run on an image of shape {tuple(input_shape)} '
                        f'(C, H, W): {told(error)}') from error
    for name, inputs, outputs in shapes:
        # a transposed convolution applies its kernel at each input position
        shape = inputs if isinstance(layers[name], nn.ConvTranspose2d) else outputs
        positions[name] += math.prod(
            shape[1:-1] if isinstance(layers[name], nn.Linear) else shape[2:])
    return {name: _statistics(layers[name], count) for name, count in positions.items()}


def count_complexity(model: nn.Module, input_shape: Sequence[int]) -> Tuple[int, int]:
    """Count the parameters and MACs of a detector.

    As in the literature, only the MACs of convolutions and linear layers count.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`.
        input_shape (Sequence[int]): Shape (C, H, W) of the image in pixels.

    Returns:
        tuple[int, int]: Parameters, and MACs for an image.
    """
    macs = sum(item.macs for item in record_convs(model, input_shape).values())
    return sum(param.numel() for param in model.parameters()), macs


def _statistics(layer: nn.Module, positions: int) -> ConvStatistics:
    kernel_size = math.prod(getattr(layer, 'kernel_size', ()))
    in_channels, out_channels = channel_counts(layer)
    return ConvStatistics(in_channels, out_channels, kernel_size, positions,
                          getattr(layer, 'groups', 1))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Parameters and MACs of a detector."""
import math
from dataclasses import dataclass, replace
from typing import Dict, Sequence, Tuple

import torch.nn as nn

from mmgcp.nn.forward import record_shapes

COUNTED_TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


@dataclass(frozen=True)
class ConvStatistics:
    """What the cost of a convolution or linear layer consists of.

    Attributes:
        in_channels (int): Input channels.
        out_channels (int): Output channels.
        kernel_size (int): Weights for each pair of input and output channel.
        positions (int): Positions at which the kernel is applied to an image.
        groups (int): Groups of a convolution. Defaults to 1.
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
        """Multiply-accumulate MACs for one image, without the bias."""
        return self.weights * self.positions

    def pruned(self, fewer_in: int, fewer_out: int) -> 'ConvStatistics':
        """Return the same with fewer channels, in a depthwise convolution fewer groups."""
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
        dict[str, ConvStatistics]: One for each layer. A layer that runs several times (a
        head shared by the levels) has the sum of its positions; one that does not run
        in eval mode has none.
    """
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, COUNTED_TYPES)}
    positions = dict.fromkeys(layers, 0)
    for name, inputs, outputs in record_shapes(model, layers, input_shape):
        # a transposed convolution applies its kernel at each input position
        shape = inputs if isinstance(layers[name], nn.ConvTranspose2d) else outputs
        positions[name] += math.prod(
            shape[1:-1] if isinstance(layers[name], nn.Linear) else shape[2:])
    return {name: _statistics(layers[name], count) for name, count in positions.items()}


def count_complexity(model: nn.Module, input_shape: Sequence[int]) -> Tuple[int, int]:
    """Count the parameters and the MACs of a detector.

    The MACs are those of convolutions and linear layers, as in the literature.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`.
        input_shape (Sequence[int]): Shape (C, H, W) of the image in pixels.

    Returns:
        tuple[int, int]: Parameters, and MACs for one image.
    """
    macs = sum(item.macs for item in record_convs(model, input_shape).values())
    return sum(param.numel() for param in model.parameters()), macs


def _statistics(module: nn.Module, positions: int) -> ConvStatistics:
    if isinstance(module, nn.Linear):
        return ConvStatistics(module.in_features, module.out_features, 1, positions)
    return ConvStatistics(module.in_channels, module.out_channels,
                          module.kernel_size[0] * module.kernel_size[1], positions,
                          module.groups)

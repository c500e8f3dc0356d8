# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The kernels that read the channels of a channel unit."""
from typing import List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.layers import find_layer, num_channels, spread_inputs, weight_by_input
from mmgcp.pruning.layerwise.consumers import find_consumers
from mmgcp.pruning.units import ChannelUnit


class ConsumerKernels:
    """The weights of the consumers of a channel unit.

    Args:
        model (nn.Module): The model.
        unit (ChannelUnit): The unit, of size C.
        names (Sequence[str]): Names of the consumers.

    Attributes:
        weights (list[nn.Parameter]): The weight of each consumer.
    """

    def __init__(self, model: nn.Module, unit: ChannelUnit, names: Sequence[str]):
        slices = find_consumers(model, unit)
        self._size = unit.size
        self._slices = [slices[name] for name in names]
        self._layers = [find_layer(model, name) for name in names]
        self.weights: List[nn.Parameter] = [layer.weight for layer in self._layers]

    def copy(self) -> List[Tensor]:
        """Copy the values of the weights."""
        return [weight.detach().clone() for weight in self.weights]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor]) -> None:
        """Set the weights to values that :meth:`copy` returned."""
        for weight, value in zip(self.weights, values):
            weight.copy_(value)

    @torch.no_grad()
    def clear(self) -> None:
        """Set the kernels that read the unit to zero."""
        for weight, mask in zip(self.weights, self.masks(torch.zeros(self._size).bool())):
            weight.mul_(mask)

    @torch.no_grad()
    def restore_channels(self, values: Sequence[Tensor], channels: Tensor) -> None:
        """Set the kernels that read some channels of the unit to earlier values.

        Args:
            values (Sequence[Tensor]): What :meth:`copy` returned.
            channels (Tensor): Mask (C, ) of the channels.
        """
        for weight, value, others in zip(self.weights, values, self.masks(~channels)):
            weight.copy_(torch.where(others, weight, value))

    def masks(self, selected: Tensor) -> List[Tensor]:
        """Mask the weights, leaving out kernels that read channels that are not selected.

        Args:
            selected (Tensor): Mask (C, ) of the selected channels of the unit.

        Returns:
            list[Tensor]: For each weight a mask that can be broadcast to its shape. Kernels
            that read channels of other units are in it.
        """
        masks = []
        for layer, slices in zip(self._layers, self._slices):
            mask = torch.ones(num_channels(layer, 'in'), dtype=torch.bool)
            for item in slices:
                mask[item.channels] = selected[item.unit_index]
            masks.append(spread_inputs(layer, mask).to(layer.weight.device))
        return masks

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum up the squares of the kernels of each channel.

        Args:
            tensors (Sequence[Tensor]): A tensor of the shape of each weight, such as its
                gradient.

        Returns:
            Tensor: Squared Frobenius norms (C, ) in double precision, on the CPU. Those of all
            kernels that read a channel add up.
        """
        total = torch.zeros(self._size, dtype=torch.double)
        for layer, slices, tensor in zip(self._layers, self._slices, tensors):
            squares = weight_by_input(layer, tensor.detach().cpu().double().square())
            norms = squares.flatten(1).sum(1)
            for item in slices:
                total.index_add_(0, item.unit_index, norms[item.channels])
        return total

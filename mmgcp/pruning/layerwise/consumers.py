# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers that read the channels of a channel unit, and the kernels they read them with."""
from typing import Dict, Iterable, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels, spread_inputs, weight_by_input
from mmgcp.pruning.units import ChannelSlice, ChannelUnit


def find_consumers(model: nn.Module, unit: ChannelUnit) -> Dict[str, List[ChannelSlice]]:
    """Find the layers with weights that read a unit: the slices of their inputs by name."""
    found: Dict[str, List[ChannelSlice]] = {}
    for item in unit.side('in'):
        if isinstance(find_layer(model, item.module), WEIGHT_TYPES):
            found.setdefault(item.module, []).append(item)
    return found


class ConsumerKernels:
    """The kernels with which layers read the C channels of a unit.

    Attributes:
        weights (list[nn.Parameter]): The whole weight of each of these layers.
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
    def restore(self, values: Iterable[Tensor]) -> None:
        """Set the weights to values such as those that :meth:`copy` returned."""
        for weight, value in zip(self.weights, values):
            weight.copy_(value)

    @torch.no_grad()
    def restore_channels(self, values: Sequence[Tensor], channels: Tensor) -> None:
        """Set only the kernels of some of the channels, given as a mask (C, )."""
        self.restore([torch.where(others, weight, value) for weight, value, others in zip(
            self.weights, values, self.masks(~channels))])

    def masks(self, selected: Tensor) -> List[Tensor]:
        """Return a mask of each weight that leaves out the channels that are not selected (C, ).

        It can be broadcast to the weight. Kernels that read other units are always in it.
        """
        masks = []
        for layer, slices in zip(self._layers, self._slices):
            mask = torch.ones(num_channels(layer, 'in'), dtype=torch.bool)
            for item in slices:
                mask[item.channels] = selected[item.unit_index]
            masks.append(spread_inputs(layer, mask).to(layer.weight.device))
        return masks

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the squared Frobenius norms (C, ) of each channel's kernels over all layers.

        The tensors have the shapes of the weights, such as their gradients. The result is in
        double precision on the CPU.
        """
        total = torch.zeros(self._size, dtype=torch.double)
        for layer, slices, tensor in zip(self._layers, self._slices, tensors):
            squares = weight_by_input(layer, tensor.detach().cpu().double().square())
            norms = squares.flatten(1).sum(1)
            for item in slices:
                total.index_add_(0, item.unit_index, norms[item.channels])
        return total

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The kernels that read the channels of a channel unit."""
from contextlib import contextmanager
from typing import Dict, Iterator, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels, spread_inputs
from mmgcp.pruning.units import ChannelSlice, ChannelUnit


def readers(model: nn.Module, unit: ChannelUnit) -> Dict[str, List[ChannelSlice]]:
    """Return the slices of each layer with weights that reads channels of a unit, by name."""
    found: Dict[str, List[ChannelSlice]] = {}
    for item in unit.side('in'):
        if isinstance(find_layer(model, item.module), WEIGHT_TYPES):
            found.setdefault(item.module, []).append(item)
    return found


class Kernels:
    """The weights of the layers that read the channels of a channel unit.

    Args:
        model (nn.Module): The model.
        unit (ChannelUnit): The unit, of size C.
        names (Sequence[str]): Names of these layers.

    Attributes:
        weights (list[nn.Parameter]): The weights of the layers.
    """

    def __init__(self, model: nn.Module, unit: ChannelUnit, names: Sequence[str]):
        slices = readers(model, unit)
        self.names = list(names)
        self.size = unit.size
        self._slices = [slices[name] for name in self.names]
        self._layers = [find_layer(model, name) for name in self.names]
        self.weights: List[nn.Parameter] = [layer.weight for layer in self._layers]

    def copy(self) -> List[Tensor]:
        """Copy the values of the weights."""
        return [weight.detach().clone() for weight in self.weights]

    def restore(self, values: Sequence[Tensor]) -> None:
        """Give the weights the values that :meth:`copy` returned."""
        for weight, value in zip(self.weights, values):
            weight.detach().copy_(value)

    def masks(self, selected: Tensor) -> List[Tensor]:
        """Return what of the weights reads no channel of the unit but some.

        Args:
            selected (Tensor): Mask (C, ) of these channels.

        Returns:
            list[Tensor]: Masks that have the dimensions of the weights. Channels of other
            units are in them.
        """
        masks = []
        for layer, slices in zip(self._layers, self._slices):
            mask = torch.ones(num_channels(layer, 'in'), dtype=torch.bool)
            for item in slices:
                mask[item.channels] = selected[item.unit_index]
            masks.append(spread_inputs(layer, mask).to(layer.weight.device))
        return masks

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the squared Frobenius norms (C, ) of the slices of each channel of the unit.

        Args:
            tensors (Sequence[Tensor]): A tensor of the shape of each weight. The norms of
                all slices that read a channel add up.
        """
        total = torch.zeros(self.size, dtype=torch.double)
        for layer, slices, tensor in zip(self._layers, self._slices, tensors):
            norms = _by_input(layer, tensor.detach().cpu().double().square())
            for item in slices:
                total.index_add_(0, item.unit_index, norms[item.channels])
        return total


def _by_input(layer: nn.Module, squares: Tensor) -> Tensor:
    """The sums (K, ) of what belongs to each input channel in a tensor like the weight."""
    if isinstance(layer, nn.Linear):
        return squares.sum(0)
    if isinstance(layer, nn.ConvTranspose2d):
        return squares.sum((1, 2, 3))
    return squares.sum((2, 3)).unflatten(0, (layer.groups, -1)).sum(1).flatten()


@contextmanager
def gradients_only_of(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let autograd follow these weights of a model and nothing else, then restore that."""
    before = [(param, param.requires_grad) for param in model.parameters()]
    try:
        for param, _ in before:
            param.requires_grad_(any(param is weight for weight in weights))
        yield
    finally:
        for param, flag in before:
            param.requires_grad_(flag)

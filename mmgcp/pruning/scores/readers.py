# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Layers that read channels: how well they could do without some of them."""
from typing import Callable, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.layers import is_depthwise, num_channels, weight_by_output
from mmgcp.nn.precision import TINY, add_products, at_least_single
from mmgcp.nn.sampling import Places, as_maps, read_patches

# Taps times channels of a kernel, beyond which taps of a channel are taken as uncorrelated
MAX_COLUMNS = 2304


def make_readers(layer: nn.Module) -> List['Reader']:
    """Make the readers of a layer: one for each group of a convolution.

    A depthwise convolution has none, as it reads nothing but what it passes on.
    """
    groups = getattr(layer, 'groups', 1)
    return [] if is_depthwise(layer) else [Reader(layer, index, groups) for index in range(groups)]


class Reader:
    """A group of a layer with I input channels, R rows of weights, and T taps of a channel.

    Rows are output channels; where T would be too large, it is 1 and each tap has a row.
    """

    def __init__(self, layer: nn.Module, index: int, groups: int):
        self.layer = layer
        width, height = num_channels(layer, 'in') // groups, num_channels(layer, 'out') // groups
        self.first_input, self.first_output = index * width, index * height
        self.size = num_channels(layer, 'in')
        outputs = slice(self.first_output, self.first_output + height)
        weight = weight_by_output(layer).detach()[outputs].double().clone()
        weight = weight.reshape(height, width, -1)
        self.whole = (not isinstance(layer, nn.ConvTranspose2d)
                      and width * weight.shape[2] <= MAX_COLUMNS)
        self.taps = weight.shape[2] if self.whole else 1
        # Output channel (R, ) of each row, counted in the group
        self.rows = torch.arange(height, device=weight.device)
        if not self.whole:
            self.rows = self.rows.repeat_interleave(weight.shape[2])
            weight = weight.transpose(1, 2).flatten(0, 1)[..., None]
            if isinstance(layer, nn.ConvTranspose2d):  # an output sees a part of the taps
                weight = weight / (layer.stride[0] * layer.stride[1])**0.5
        self.weight = weight.flatten(1)  # (R, I * T)
        columns = self.weight.shape[1]
        self.gram = weight.new_zeros(columns, columns)
        self.total = weight.new_zeros(columns)
        self.count = weight.new_zeros(())
        self.squares = weight.new_zeros(height)  # of the gradients of outputs
        self.present = torch.ones(width, dtype=torch.bool, device=weight.device)
        self._costs: Optional[Tensor] = None

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.weight.device

    def see(self, inputs: Tensor, output: Tensor, draw: Callable[[Tensor], Places]) -> None:
        """See inputs at places of the output, or of the inputs themselves."""
        maps = as_maps(self.layer, inputs)
        maps = maps[..., self.first_input:self.first_input + len(self.present)]
        if self.whole:
            places = draw(as_maps(self.layer, output.detach()))
            values = read_patches(self.layer, maps, places).transpose(1, 2).flatten(1)
        else:
            values = maps[draw(maps)]
        values = at_least_single(values)
        add_products(self.gram[None], values[:, None], values[:, None])
        self.total += values.sum(0, dtype=torch.double)
        self.count += len(values)

    def see_gradient(self, gradient: Tensor) -> None:
        """See the gradient of an output."""
        maps = as_maps(self.layer, gradient.detach())
        squares = at_least_single(maps).square().sum((0, 1, 2)).double()
        self.squares += squares[self.first_output:self.first_output + len(self.squares)]

    def join(self, join: Callable[[Tensor], Tensor], images: int) -> None:
        """Join what ranks have seen, and turn sums to means; squares are those of an image."""
        self.gram, self.total = join(self.gram), join(self.total)
        self.count = join(self.count).clamp(min=1)
        self.squares = join(self.squares) / images

    def begin(self, ridge: float) -> None:
        """Replace the sum of squares by the inverse covariance, with a share added to each."""
        mean, largest = self.total / self.count, self.gram.diagonal().max() / self.count
        self.gram = self.gram / self.count - torch.outer(mean, mean)
        diagonal = self.gram.diagonal()
        floor = TINY * largest + 1e-30
        diagonal += ridge * diagonal.mean() + floor
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.gram))
        del self.gram

    def costs(self) -> Tensor:
        """Return the error without each channel of the layer: NaN for those of other groups."""
        if self._costs is None:
            channels, taps = len(self.present), self.taps
            blocks = self.inverse.view(channels, taps, channels, taps)
            index = torch.arange(channels, device=self.device)
            blocks = blocks[index, :, index]  # (I, T, T)
            blocks[~self.present] = torch.eye(taps).to(blocks)
            weight = self.weight * self.squares[self.rows, None].sqrt()
            weight = weight.view(-1, channels, taps).permute(1, 2, 0)  # (I, T, R)
            found = (weight * torch.linalg.solve(blocks, weight)).sum((1, 2))
            self._costs = found.new_full((self.size, ), float('nan'))
            self._costs[self.first_input:self.first_input + channels] = found
        return self._costs

    def remove(self, channels: Tensor, side: str) -> None:
        """Remove channels (K, ) of the layer on a side."""
        channels = channels.to(self.device)
        size, first = ((len(self.present), self.first_input) if side == 'in'
                       else (len(self.squares), self.first_output))
        channels = channels[(channels >= first) & (channels < first + size)] - first
        if not len(channels):
            return
        self._costs = None
        if side == 'out':
            self.squares[channels] = 0
            return
        self.present[channels] = False
        gone = (channels[:, None] * self.taps + torch.arange(self.taps).to(channels)).flatten()
        # Elimination: the inverse of the rest, and the weights that make up for what has gone
        shares = torch.linalg.solve(self.inverse[gone][:, gone], self.inverse[gone])
        self.weight -= self.weight[:, gone] @ shares
        self.inverse -= self.inverse[:, gone] @ shares
        self.weight[:, gone] = 0
        self.inverse[gone] = 0
        self.inverse[:, gone] = 0

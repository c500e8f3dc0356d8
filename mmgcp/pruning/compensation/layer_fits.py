# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How single layers are fitted to what they computed before channels were removed."""
import math
from typing import Callable, Dict, Hashable, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.sampling import Places, as_maps, read_patches

from .folding import constant_outputs
from .least_squares import LeastSquares

# Unknowns of an output, beyond which a system of equations takes too much time and memory
MAX_UNKNOWNS = 2304


# Chooses places in feature maps (N, H, W, C)
Choice = Callable[[Tensor], Places]
# What BatchNorms (by their names) or the bias (by ()) have to add to the outputs, (O, )
Offsets = Dict[Hashable, Tensor]


class Kept:
    """The channels of a layer on one side that stay, by the G groups of a convolution.

    Groups of which nothing stays are left out: of a depthwise convolution those are its removed
    channels.
    """

    def __init__(self, mask: Tensor, groups: int):
        mask = mask.view(groups, -1)
        self.width = mask.shape[1]
        self.groups = mask.any(1).nonzero().flatten()  # (G, )
        self.inside = mask.nonzero()[:, 1].view(len(self.groups), -1)  # (G, K), of each group

    @property
    def channels(self) -> Tensor:
        """Numbers (G, K) of the channels in the layer."""
        return self.groups[:, None] * self.width + self.inside


class LayerFit:
    """Base of the fits of a layer.

    Args:
        layer (nn.Module): The layer, which changes in place.
        original (nn.Module): The same layer of the original model.
        inputs (Tensor): Mask (I, ) of the input channels that stay.
        outputs (Tensor): Mask (O, ) of the output channels that stay.
    """

    def __init__(self, layer: nn.Module, original: nn.Module, inputs: Tensor, outputs: Tensor):
        self.layer = layer
        self.original = original
        groups = getattr(layer, 'groups', 1)
        self.inputs, self.outputs = Kept(inputs, groups), Kept(outputs, groups)

    def targets(self, inputs: Tensor, output: Tensor, choose: Choice) -> Tuple[Places, Tensor]:
        """Return places, and what is to be estimated there, from a run of the original layer."""
        raise NotImplementedError

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples: inputs of the changed layer, and targets whose offset has a key."""
        raise NotImplementedError

    def apply(self) -> Offsets:
        """Change the layer to the best estimate from all samples; return what it lacks."""
        raise NotImplementedError


class KernelFit(LayerFit):
    """Estimates the outputs of a layer by a new kernel.

    Asymmetric reconstruction of `arXiv 1707.06168 <https://arxiv.org/abs/1707.06168>`_, with a
    ridge towards the present kernel. For linear layers, and convolutions with zero padding.
    """

    def __init__(self, layer: nn.Module, original: nn.Module, inputs: Tensor, outputs: Tensor,
                 ridge: float):
        super().__init__(layer, original, inputs, outputs)
        self.solver = LeastSquares(self._kernel().flatten(2), ridge)

    def _where(self) -> Tuple[Tensor, Tensor, Tensor]:
        """Index what stays of a weight (G, O / G, I / G, T) with T taps."""
        return (self.outputs.groups[:, None, None], self.outputs.inside[:, :, None],
                self.inputs.inside[:, None])

    def _by_group(self) -> Tensor:
        weight, groups = self.layer.weight.detach(), getattr(self.layer, 'groups', 1)
        return weight.view(groups, len(weight) // groups, weight.shape[1], -1)

    def _kernel(self) -> Tensor:
        return self._by_group()[self._where()]

    def targets(self, inputs: Tensor, output: Tensor, choose: Choice) -> Tuple[Places, Tensor]:
        """Return places of the output, and its values (S, G, O / G) there without the bias."""
        maps = as_maps(self.original, output)
        places = choose(maps)
        values = maps[places]
        if self.original.bias is not None:
            values = values - self.original.bias
        return places, values[:, self.outputs.channels]

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples; see the base class."""
        maps = as_maps(self.layer, inputs)[..., self.inputs.channels.flatten()]
        patches = read_patches(self.layer, maps, places)  # (S, T, C)
        patches = patches.unflatten(2, self.inputs.channels.shape).permute(0, 2, 3, 1).flatten(2)
        self.solver.add(patches, targets, key)

    def apply(self) -> Offsets:
        """Set the kernel; see the base class."""
        matrix, offsets = self.solver.solve()
        kernel = matrix.view(self._kernel().shape)
        self._by_group()[self._where()] = kernel.to(self.layer.weight)
        return {key: _spread(values, self.outputs, self.layer) for key, values in offsets.items()}


class MixingFit(LayerFit):
    """Estimates the original inputs of a layer by a mixture of the new ones, at single places.

    The mixture is multiplied into the weight. It has as many unknowns as there are channels,
    however large the kernel, and is right for any layer that is linear; a constant is absorbed as
    by folding means. With an infinite ridge there is only this constant.
    """

    def __init__(self, layer: nn.Module, original: nn.Module, inputs: Tensor, outputs: Tensor,
                 ridge: float):
        super().__init__(layer, original, inputs, outputs)
        count, kept = self.inputs.inside.shape
        selection = torch.zeros(count, self.inputs.width, kept, device=layer.weight.device)
        selection.scatter_(1, self.inputs.inside[:, None], 1.)
        self.solver = LeastSquares(selection, ridge)

    def targets(self, inputs: Tensor, output: Tensor, choose: Choice) -> Tuple[Places, Tensor]:
        """Return places of the input, and all of its values (S, G, I / G) there."""
        maps = as_maps(self.original, inputs)
        places = choose(maps)
        return places, maps[places].unflatten(1, (-1, self.inputs.width))[:, self.inputs.groups]

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples; see the base class."""
        values = as_maps(self.layer, inputs)[places]
        self.solver.add(values[:, self.inputs.channels], targets, key)

    def apply(self) -> Offsets:
        """Multiply the mixture into the weight; see the base class."""
        mixture, constants = self.solver.solve()  # (G, I / G, K)
        weight, groups = self.original.weight.detach().double(), getattr(self.layer, 'groups', 1)
        weight = weight.unflatten(0, (groups, -1))[self.inputs.groups]
        changed = self.layer.weight.detach().unflatten(0, (groups, -1))
        rows, inside = self.inputs.groups[:, None], self.inputs.inside
        if isinstance(self.layer, nn.ConvTranspose2d):  # (G, I / G, O / G, ...)
            mixed = torch.einsum('gfo...,gfk->gko...', weight, mixture)
            changed[rows, inside] = mixed.to(changed)
        else:
            mixed = torch.einsum('gof...,gfk->gko...', weight, mixture)
            changed.transpose(1, 2)[rows, inside] = mixed.to(changed)
        return {key: constant_outputs(self.original, _spread(values, self.inputs, self.layer, True)
                                      ).mean(1) for key, values in constants.items()}


def make_fit(layer: nn.Module, original: nn.Module, inputs: Tensor, outputs: Tensor,
             ridge: float) -> LayerFit:
    """Make the fit of a layer of which channels stay, by masks (I, ) and (O, )."""
    groups = getattr(layer, 'groups', 1)
    kept = int(inputs.sum()) // max(1, int(inputs.view(groups, -1).any(1).sum()))
    is_simple = isinstance(layer, nn.Linear) or (
        not isinstance(layer, nn.ConvTranspose2d) and layer.padding_mode == 'zeros')
    if is_simple and kept * layer.weight[0, 0].numel() <= MAX_UNKNOWNS:
        return KernelFit(layer, original, inputs, outputs, ridge)
    if len(inputs) // groups > MAX_UNKNOWNS:
        ridge = math.inf
    return MixingFit(layer, original, inputs, outputs, ridge)


def _spread(values: Tensor, kept: Kept, layer: nn.Module, all_of_group: bool = False) -> Tensor:
    """Spread values by group, (G, K) or of all channels, over the channels of a side of a layer."""
    spread = values.new_zeros(getattr(layer, 'groups', 1), kept.width)
    if all_of_group:
        spread[kept.groups] = values
    else:
        spread[kept.groups[:, None], kept.inside] = values
    return spread.flatten()

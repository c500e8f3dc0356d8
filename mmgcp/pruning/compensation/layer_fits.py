# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How single layers are fitted to what they computed before channels were removed."""
from typing import Callable, Dict, Hashable, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.layers import WEIGHT_TYPES
from mmgcp.nn.precision import at_least_single
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
        self.size, self.width = mask.shape
        self.groups = mask.any(1).nonzero().flatten()  # (G, )
        self.inside = mask.nonzero()[:, 1].view(len(self.groups), -1)  # (G, K), of each group

    @property
    def channels(self) -> Tensor:
        """Numbers (G, K) of the channels in the layer."""
        return self.groups[:, None] * self.width + self.inside

    def select(self, values: Tensor) -> Tensor:
        """Select of all channels (S, C) of a layer those that stay: (S, G, K)."""
        if self.inside.numel() == values.shape[1]:
            return values.unflatten(1, self.inside.shape)
        return values[:, self.channels]

    def spread(self, values: Tensor) -> Tensor:
        """Spread values (G, K) over all channels (C, ), with zeros for others."""
        spread = values.new_zeros(self.size * self.width)
        spread[self.channels] = values
        return spread


class LayerFit:
    """Base of the fits of a layer.

    Args:
        layer (nn.Module): The layer, which changes in place.
        original (nn.Module): The same layer of the original model.
        inputs (Kept): The input channels that stay.
        outputs (Kept): The output channels that stay.
        ridge (float): See :class:`LeastSquares`.
    """
    kind: str  # for a report

    def __init__(self, layer: nn.Module, original: nn.Module, inputs: Kept, outputs: Kept,
                 ridge: float):
        self.layer, self.original = layer, original
        self.inputs, self.outputs = inputs, outputs
        self.solver = LeastSquares(self._prior(), ridge)

    def _prior(self) -> Tensor:
        """Return the matrix (G, O, I) that estimates targets as the layer does now."""
        raise NotImplementedError

    def targets(self, inputs: Tensor, output: Tensor, choose: Choice) -> Tuple[Places, Tensor]:
        """Return places, and what is to be estimated there, from a run of the original layer.

        By default that is its output without the bias, (S, G, K) of the channels that stay.
        """
        maps = as_maps(self.original, output)
        places = choose(maps)
        values = at_least_single(maps[places])
        if self.original.bias is not None:
            values = values - self.original.bias
        return places, self.outputs.select(values)

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples: inputs of the changed layer, and targets whose offset has a key."""
        raise NotImplementedError

    def apply(self) -> Offsets:
        """Change the weight to the best estimate from all samples; return what it lacks."""
        raise NotImplementedError


class KernelFit(LayerFit):
    """Estimates the outputs of a layer by a new kernel.

    Asymmetric reconstruction of `arXiv 1707.06168 <https://arxiv.org/abs/1707.06168>`_, with a
    ridge towards the present kernel. For linear layers and convolutions that are not transposed.
    """
    kind = 'kernel'

    def _prior(self) -> Tensor:
        return self._by_group()[self._where()].transpose(2, 3).flatten(2)

    def _by_group(self) -> Tensor:
        """View the weight as (G, O / G, I / G, T) with T taps."""
        weight = self.layer.weight.detach()
        return weight.view(self.inputs.size, -1, weight.shape[1], weight[0, 0].numel())

    def _where(self) -> Tuple[Tensor, Tensor, Tensor]:
        """Index what stays in :meth:`_by_group`."""
        return (self.outputs.groups[:, None, None], self.outputs.inside[:, :, None],
                self.inputs.inside[:, None])

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples; see the base class."""
        patches = read_patches(self.layer, as_maps(self.layer, inputs), places)  # (S, T, I)
        samples, taps, _ = patches.shape
        patches = self.inputs.select(patches.flatten(0, 1)).unflatten(0, (samples, taps))
        self.solver.add(patches.transpose(1, 2).flatten(2), targets, key)

    def apply(self) -> Offsets:
        """Set the kernel; see the base class."""
        matrix, offsets = self.solver.solve()
        kernel = matrix.unflatten(2, (-1, self.inputs.inside.shape[1])).transpose(2, 3)
        self._by_group()[self._where()] = kernel.to(self.layer.weight)
        return {key: self.outputs.spread(values) for key, values in offsets.items()}


class MixingFit(LayerFit):
    """Estimates the original inputs of a layer by a mixture of the new ones, at single places.

    The mixture is multiplied into the weight of the original. It has as many unknowns as there
    are channels, however large the kernel, and is right for any layer that is linear; a constant
    is absorbed as by folding means.
    """
    kind = 'mixture of inputs'

    def _prior(self) -> Tensor:
        groups, kept = self.inputs.inside.shape
        selection = torch.zeros(groups, self.inputs.width, kept, device=self.layer.weight.device)
        return selection.scatter_(1, self.inputs.inside[:, None], 1.)

    def targets(self, inputs: Tensor, output: Tensor, choose: Choice) -> Tuple[Places, Tensor]:
        """Return places of the input, and all of its values (S, G, I / G) there."""
        maps = as_maps(self.original, inputs)
        places = choose(maps)
        return places, maps[places].unflatten(1, (-1, self.inputs.width))[:, self.inputs.groups]

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples; see the base class."""
        self.solver.add(self.inputs.select(as_maps(self.layer, inputs)[places]), targets, key)

    def apply(self) -> Offsets:
        """Multiply the mixture into the weight; see the base class."""
        mixture, constants = self.solver.solve()  # (G, I / G, K)
        groups, inside = self.inputs.groups, self.inputs.inside
        weight = self.original.weight.detach().unflatten(0, (self.inputs.size, -1))[groups]
        changed = self.layer.weight.detach().unflatten(0, (self.inputs.size, -1))
        if isinstance(self.layer, nn.ConvTranspose2d):  # (G, I / G, O / G, ...)
            mixed = torch.einsum('gfo...,gfk->gko...', weight.double(), mixture)
        else:
            mixed = torch.einsum('gof...,gfk->gko...', weight.double(), mixture)
            changed = changed.transpose(1, 2)
        changed[groups[:, None], inside] = mixed.to(changed)
        return {key: self._absorbed(values) for key, values in constants.items()}

    def _absorbed(self, constants: Tensor) -> Tensor:
        """Return what constant inputs (G, I / G) add to the outputs, (O, )."""
        inputs = constants.new_zeros(self.inputs.size, self.inputs.width)
        inputs[self.inputs.groups] = constants
        return constant_outputs(self.original, inputs.flatten()).mean(1)


class MeanFit(LayerFit):
    """Leaves the weight alone: only the means of the outputs become those of the original."""
    kind = 'mean'

    def _prior(self) -> Tensor:
        return self.layer.weight.new_zeros(*self.outputs.inside.shape, 0)

    def add(self, inputs: Tensor, places: Places, targets: Tensor, key: Hashable) -> None:
        """Add samples; see the base class. The layer runs for its outputs, without hooks."""
        values = at_least_single(as_maps(self.layer, self.layer.forward(inputs))[places])
        if self.layer.bias is not None:
            values = values - self.layer.bias
        lacking = targets - self.outputs.select(values)
        self.solver.add(lacking[..., :0], lacking, key)

    def apply(self) -> Offsets:
        """Return what the weight lacks; see the base class."""
        return {key: self.outputs.spread(values) for key, values in self.solver.solve()[1].items()}


def make_fit(layer: nn.Module, original: nn.Module, kept: Dict[str, Tensor], ridge: float,
             inputs: Tensor, output: Tensor) -> LayerFit:
    """Make the fit of a layer, of which the channels of masks (C, ) by side stay.

    The inputs and the output of the original layer tell whether it computes what its class does.
    """
    groups = getattr(layer, 'groups', 1)
    sides = [Kept(kept[side], groups) for side in ('in', 'out')]
    unknowns = sides[0].inside.shape[1] * layer.weight[0, 0].numel()
    if not _is_plain(original, inputs, output):
        kind = MeanFit
    elif unknowns <= MAX_UNKNOWNS and not isinstance(layer, nn.ConvTranspose2d):
        kind = KernelFit
    elif sides[0].width <= MAX_UNKNOWNS and torch.equal(layer.weight, original.weight):
        kind = MixingFit
    else:
        kind = MeanFit  # also where a layer-wise criterion has adapted the weights
    return kind(layer, original, *sides, ridge)


def _is_plain(layer: nn.Module, inputs: Tensor, output: Tensor) -> bool:
    """Whether a layer has computed what the class of torch that it inherits computes."""
    plain = next(kind for kind in WEIGHT_TYPES if isinstance(layer, kind))
    if type(layer).forward is plain.forward:
        return True
    expected = plain.forward(layer, inputs[:1])
    return expected.shape == output[:1].shape and torch.allclose(
        expected, output[:1], rtol=1e-3, atol=1e-3 * float(expected.abs().max()))

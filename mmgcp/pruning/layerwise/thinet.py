# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""ThiNet: remove the channels without which the next layers can be reconstructed best."""
from typing import Dict, Iterable, List, NamedTuple, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import ShortRuns, eval_mode
from mmgcp.nn.hooks import hooked
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, is_depthwise, num_channels, spread_inputs
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.compensation.folding import fold_constants
from mmgcp.pruning.compensation.statistics import Norms, measure_inputs
from mmgcp.pruning.surgery import gather_channels
from mmgcp.pruning.units import ChannelSlice, ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import LayerwiseCriterion, Means

# Of the squared singular values of the samples: what is below the largest one times this is noise
LEAST_EIGENVALUE = 1e-8


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


class _Sampled(NamedTuple):
    """What was found out about a unit.

    Attributes:
        name (str): Name of the unit.
        gram (Tensor): Sums (C, C) of the products of two channels' contributions.
        means (Means, optional): Mean inputs of the layers that read the unit, if they are folded.
    """
    name: str
    gram: Tensor
    means: Optional[Means]


@TASK_UTILS.register_module()
class ThiNet(LayerwiseCriterion):
    """Removes the channels that the layers reading them miss least (`ThiNet, arXiv 1707.06342
    <https://arxiv.org/abs/1707.06342>`_).

    An entry of a layer's output, before normalisation and activation and without the bias, is
    a sum of contributions x_c of the channels c that the layer reads (equation 4). Of random
    entries of all layers that read a unit, the contributions are recorded. Channels are removed
    one by one, always the one with which the squared sum of what has been removed, over all
    entries, grows least (equation 6, algorithm 1); the score of a channel is its place in this
    order. Where only whole units can be removed, they are taken one by one. The kernels of the
    channels that stay are multiplied by one factor a channel, the least squares solution for
    the sum of all contributions (equation 7).

    Beyond the paper, a unit may be read by several layers, as in shortcuts and concatenations:
    entries of all of them count, and a channel has the same factor in each. And where
    :func:`mmgcp.pruning.prune` folds the mean of removed channels into these layers, which is
    the default, the contributions are those of the channels less what is folded of them, and
    the means that the factors take away are folded as well: factors and channels are chosen
    for what a constant cannot make up for. ``prune(compensate=False)`` is the paper's method.

    Args:
        positions (int): Entries of each image and layer. The paper has 10 of 10 images of each
            of ImageNet's 1000 classes; with fewer images more are needed, several times as
            many entries as a unit has channels. Defaults to 100.
        rescale (bool): Multiply the kernels by the factors. Defaults to True.
        skip_shortcuts (bool): Leave units alone that several layers with weights compute
            together, by a sum or a product, as the paper does with the last convolution of
            each block of a ResNet. Defaults to False.
        seed (int): Seed of the random entries. Defaults to 0.
        allocation_criterion (dict, optional): See :class:`LayerwiseCriterion`.
    """

    def __init__(self, positions: int = 100, rescale: bool = True, skip_shortcuts: bool = False,
                 seed: int = 0, allocation_criterion: Optional[dict] = None):
        super().__init__(allocation_criterion)
        if positions < 1:
            raise PruningError(f'positions must be a positive number, but is {positions}')
        self.positions = positions
        self.rescale = rescale
        self.skip_shortcuts = skip_shortcuts
        self.seed = seed
        self._off: Dict[str, Tensor] = {}  # removed output channels by layer
        self._sampled: Optional[_Sampled] = None

    def skips(self, model: nn.Module, unit: ChannelUnit) -> Optional[str]:
        """Say whether a unit is computed by several layers together."""
        if not self.skip_shortcuts:
            return None
        makers = torch.zeros(unit.size, dtype=torch.long)
        for item in unit.side('out'):
            layer = find_layer(model, item.module)
            if isinstance(layer, WEIGHT_TYPES) and not is_depthwise(layer):
                makers[item.unit_index.unique()] += 1
        if bool((makers > 1).any()):
            return 'ThiNet leaves channels alone that several layers compute together'
        return None

    def score(self, model: nn.Module, unit: ChannelUnit,
              batches: Iterable[Batch]) -> Tensor:
        """Return the places (C, ) in the order of removal, from zero."""
        slices = unit.side('in')
        means = _mean_inputs(model, slices, batches) if self.folded and slices else None
        # a layer without BatchNorm and bias cannot absorb a constant
        absorbed = {name: calls for name, calls in (means or {}).items()
                    if all(calls) or find_layer(model, name).bias is not None}
        gram = self.sample(model, unit, batches, absorbed)
        self._sampled = _Sampled(unit.name, gram, means)
        return removal_places(gram, unit.norm_groups)

    def mean_inputs(self, unit: ChannelUnit) -> Optional[Means]:
        """Tell the mean inputs, which :meth:`score` measures where they are folded."""
        known = self._sampled is not None and self._sampled.name == unit.name
        return self._sampled.means if known else None

    def update(self, model: nn.Module, unit: ChannelUnit, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Multiply the kernels of the channels that stay by the least squares factors."""
        if self.rescale:
            if self._sampled is None or self._sampled.name != unit.name:
                raise PruningError(f'the unit {unit.name!r} has to be scored before its update')
            factors = least_squares_factors(self._sampled.gram, removed)
            for item in unit.side('in'):
                _scale_inputs(model.get_submodule(item.module), item, factors,
                              (self._sampled.means or {}).get(item.module, {}))
        for (name, side), channels in gather_channels([unit], {unit.name: removed}).items():
            if side == 'out':
                self._off[name] = torch.cat((self._off.get(name, channels[:0]), channels))
        self._sampled = None

    def state_dict(self) -> dict:
        return dict(off=self._off)

    def load_state_dict(self, state: dict) -> None:
        self._off = state['off']

    @torch.no_grad()
    def sample(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch],
               means: Optional[Means] = None) -> Tensor:
        """Sum up the products of the contributions of channels to sampled entries.

        Args:
            model (nn.Module): The model, left as it was.
            unit (ChannelUnit): The unit, of size C.
            batches (Iterable[Batch]): Training batches. The memory does not grow with them.
            means (dict, optional): Means of the inputs that are folded, by layer.

        Returns:
            Tensor: The Gram matrix (C, C) in double precision, on the CPU.

        Raises:
            PruningError: There are no batches.
        """
        like = next(model.parameters())
        gram = torch.zeros(unit.size, unit.size, dtype=torch.double, device=like.device)
        generator = torch.Generator().manual_seed(self.seed)

        def look(item: ChannelSlice):
            entries_of = means.get(item.module, {}) if means else {}
            mean = _overall(entries_of, item, like)

            def hook(layer, args, output):
                entries = self._draw(item.module, layer, output, generator)
                found = contributions(layer, args[0], item, unit.size, entries, mean).double()
                gram.addmm_(found.t(), found)
                runs.seen()
            return hook

        handles = [model.get_submodule(item.module).register_forward_hook(look(item))
                   for item in unit.side('in')]
        number, runs = 0, ShortRuns(model)
        with hooked(handles), eval_mode(model):
            for number, batch in enumerate(batches, 1):
                runs(batch.images.to(like))
        if not number:
            raise PruningError('there are no images to sample')
        return gram.cpu()

    def _draw(self, name: str, layer: nn.Module, output: Tensor,
              generator: torch.Generator) -> Entries:
        """Draw entries of an output, none of channels that have been removed."""
        is_linear = isinstance(layer, nn.Linear)
        channels = output.shape[-1] if is_linear else output.shape[1]
        left = torch.ones(channels, dtype=torch.bool)
        if name in self._off:
            left[self._off[name]] = False
        left = left.nonzero().flatten()
        height, width = output.shape[2:] if not is_linear else (
            output[0].numel() // channels, 1)
        size = (len(output) * self.positions, )
        entries = Entries(
            torch.arange(len(output)).repeat_interleave(self.positions),
            left[torch.randint(len(left), size, generator=generator)],
            torch.randint(height, size, generator=generator),
            torch.randint(width, size, generator=generator))
        return Entries(*(item.to(output.device) for item in entries))


def contributions(layer: nn.Module, inputs: Tensor, item: ChannelSlice, size: int,
                  entries: Entries, mean: Optional[Tensor] = None) -> Tensor:
    """Compute what the channels of a unit contribute to entries of a layer's output.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer.
        inputs (Tensor): What it reads: (N, I, H, W), or (N, ..., I) of a linear layer.
        item (ChannelSlice): Which of its K input channels belong to which channels of the unit.
            An input that belongs to several of them counts for each by an equal part.
        size (int): Number C of channels of the unit.
        entries (Entries): The S entries.
        mean (Tensor, optional): Means (K, ) of the inputs, whose contributions far from the
            border are taken away, as they are folded.

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
        if isinstance(layer, nn.ConvTranspose2d):  # a tap reaches one output of each stride
            totals = totals / (layer.stride[0] * layer.stride[1])
    if mean is not None:
        found = found - mean * totals
    found = found / channels.bincount()[channels]
    return found.new_zeros(len(found), size).index_add(1, item.unit_index.to(found.device), found)


def _kernels(layer: nn.Module, channels: Tensor, outputs: Tensor) -> Tensor:
    """Kernels (S, K, h, w) for some inputs of some outputs, zero for those of other groups."""
    groups, weight = layer.groups, layer.weight.detach()
    ins, outs = layer.in_channels // groups, layer.out_channels // groups
    if isinstance(layer, nn.ConvTranspose2d):
        kernels = weight[channels[None], (outputs % outs)[:, None]]
    else:
        kernels = weight[outputs[:, None], (channels % ins)[None]]
    connected = (outputs // outs)[:, None] == (channels // ins)[None]
    return kernels * connected[:, :, None, None]


def _patches(layer: nn.Module, inputs: Tensor, entries: Entries) -> Tensor:
    """The inputs (S, h, w, K) that a convolution multiplies its kernels with at entries."""
    if isinstance(layer, nn.ConvTranspose2d):
        return _patches_of_transposed(layer, inputs, entries)
    mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
    inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    y, x = (place[:, None] * stride + torch.arange(taps, device=place.device) * dilation
            for place, stride, taps, dilation in zip(
                (entries.rows, entries.columns), layer.stride, layer.kernel_size, layer.dilation))
    return inputs[entries.images[:, None, None], :, y[:, :, None], x[:, None]]


def _patches_of_transposed(layer: nn.Module, inputs: Tensor, entries: Entries) -> Tensor:
    places, reached = [], []
    for dim, place in enumerate((entries.rows, entries.columns)):
        taps = torch.arange(layer.kernel_size[dim], device=place.device)
        # an input at i reaches the output at i * stride - padding + tap * dilation
        offset = place[:, None] + layer.padding[dim] - taps * layer.dilation[dim]
        source = torch.div(offset, layer.stride[dim], rounding_mode='floor')
        reached.append((offset % layer.stride[dim] == 0) & (source >= 0)
                       & (source < inputs.shape[2 + dim]))
        places.append(source.clamp(0, inputs.shape[2 + dim] - 1))
    patches = inputs[entries.images[:, None, None], :, places[0][:, :, None], places[1][:, None]]
    return patches * (reached[0][:, :, None] & reached[1][:, None])[..., None]


def removal_places(gram: Tensor, norm_groups: Optional[Tensor] = None) -> Tensor:
    """Remove channels greedily and return the place of each in the order of removal.

    Args:
        gram (Tensor): Gram matrix (C, C) of the channels' contributions.
        units (Tensor, optional): Numbers (C, ) of the units that are removed as a whole.

    Returns:
        Tensor: Places (C, ), of units where there are any, from zero.
    """
    numbers = torch.arange(len(gram)) if norm_groups is None else norm_groups
    members = F.one_hot(numbers).to(gram)
    gram = members.t() @ gram @ members
    growth = gram.diagonal().clone()  # of the squared sum, if this one goes next
    places = torch.zeros(len(gram))
    for place in range(len(gram)):
        chosen = int(growth.argmin())
        places[chosen] = place
        growth += 2 * gram[chosen]
        growth[chosen] = float('inf')
    return places[numbers]


def least_squares_factors(gram: Tensor, removed: Tensor) -> Tensor:
    """Find the factors of the remaining channels that best make up for the removed ones.

    With contributions X, they minimise ``||X @ 1 - X_kept @ w||``. The difference of w from 1
    is solved for, without the directions in which the samples do not vary (by less than
    ``LEAST_EIGENVALUE`` of the greatest square): there the factors remain 1.

    Args:
        gram (Tensor): Gram matrix (C, C) of X.
        removed (Tensor): Indices (K, ) of the removed channels.

    Returns:
        Tensor: The factors (C, ) in double precision, 1 for removed channels.
    """
    gone = torch.zeros(len(gram), dtype=torch.bool)
    gone[removed] = True
    factors = torch.ones(len(gram), dtype=torch.double)
    values, vectors = torch.linalg.eigh(gram.double()[~gone][:, ~gone])
    stable = values > LEAST_EIGENVALUE * values[-1].clamp(min=0)
    vectors = vectors[:, stable] / values[stable].sqrt()
    factors[~gone] += vectors @ (vectors.t() @ gram.double()[~gone][:, gone].sum(1))
    return factors


def _mean_inputs(model: nn.Module, slices: List[ChannelSlice],
                 batches: Iterable[Batch]) -> Means:
    measured = measure_inputs(model, {item.module: item.channels for item in slices},
                              (batch.images for batch in batches))
    return {name: {norms: statistics.mean for norms, statistics in calls.items()}
            for name, calls in measured.items()}


def _overall(means: Dict[Norms, Tensor], item: ChannelSlice, like: Tensor) -> Optional[Tensor]:
    """The mean input (K, ) of the calls of a layer, of all different BatchNorms."""
    if not means:
        return None
    return torch.stack(list(means.values())).mean(0).to(like)


@torch.no_grad()
def _scale_inputs(layer: nn.Module, item: ChannelSlice, factors: Tensor,
                  means: Dict[Norms, Tensor]) -> None:
    """Multiply the kernels of a unit's channels by factors (C, ) and fold what that loses."""
    scales = _input_factors(layer, item, factors)
    lost = {norms: (1 - scales[item.channels]).to(mean) * mean for norms, mean in means.items()}
    fold_constants(layer, item.channels, lost, False)
    layer.weight.mul_(spread_inputs(layer, scales).to(layer.weight))


def _input_factors(layer: nn.Module, item: ChannelSlice, factors: Tensor) -> Tensor:
    """Factors (I, ) of a layer's inputs: the mean of those of the channels of each."""
    size = num_channels(layer, 'in')
    counts = torch.zeros(size).index_add(0, item.channels, torch.ones(len(item.channels)))
    sums = torch.zeros(size, dtype=factors.dtype).index_add(
        0, item.channels, factors[item.unit_index] - 1)
    return 1 + sums / counts.clamp(min=1)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What criteria have in common that look at the filters of the layers alone."""
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import following_norms
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, is_depthwise
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit

from .base import Criterion, Progress, as_row

NORMALIZATIONS = ('mean', 'max', 'none')


class FilterCriterion(Criterion):
    """Scores channels by the filters that make them.

    A filter is all weights that an output channel of a convolution, transposed convolution
    or linear layer is computed with, without its bias. Each such layer of a channel unit has
    a row of scores of its own. Depthwise convolutions have none: they pass channels through
    that others make. A BatchNorm or any other layer behind a filter does not count, unless
    ``fold_norm`` is set.

    As in the papers, all layers of a group lose the same share of their channels, unless
    ``allocation='global'`` is asked for: filters of different layers say little about each other.

    Args:
        normalize (str): Layers differ in the number and the scale of their weights; to
            compare them, the values of a layer's channels are divided by their ``'mean'``
            (so that 1 is an average channel), or their ``'max'``, or by nothing (``'none'``).
            Defaults to 'mean'.
        fold_norm (bool): Multiply each filter by |scale| / sqrt(variance + eps) of the
            BatchNorm that takes the layer's output, which a layer's own scale then has no
            influence on. Where several BatchNorms do (in heads whose levels share
            convolutions), by the mean of these. To find them, the model runs once on noise.
            Defaults to False.

    Raises:
        PruningError: ``normalize`` is unknown.
    """

    default_allocation = 'uniform'

    def __init__(self, normalize: str = 'mean', fold_norm: bool = False):
        if normalize not in NORMALIZATIONS:
            raise PruningError(f'normalize must be one of {NORMALIZATIONS}, but is {normalize!r}')
        self.normalize = normalize
        self.fold_norm = fold_norm
        self._gains: Dict[str, Tensor] = {}

    def measure(self, filters: Tensor) -> Tensor:
        """Measure the filters of a layer.

        Args:
            filters (Tensor): Filters (C, K) in double precision.

        Returns:
            Tensor: Values (C, ), not negative.
        """
        raise NotImplementedError

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Find the BatchNorms behind the layers, if they count."""
        if self.fold_norm:
            self._gains = norm_gains(model, {item.module for unit in units
                                             for item in unit.side('out')})

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Score the channels of a channel unit.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.

        Returns:
            dict[str, Tensor]: Scores (C, ) by name of the layer that makes the channels, NaN
            for those that it does not make.
        """
        scores = {}
        for item in unit.side('out'):
            filters = filters_of(find_layer(model, item.module))
            if filters is not None:
                if item.module in self._gains:
                    filters = filters * self._gains[item.module][:, None]
                scores[item.module] = as_row(unit, item, self._normalized(
                    self.measure(filters)))
        return scores

    def _normalized(self, values: Tensor) -> Tensor:
        """Values (C, ) in relation to those of the layer; zeros stay zeros."""
        if self.normalize == 'none':
            return values
        scale = values.mean() if self.normalize == 'mean' else values.max()
        return values / scale if scale > 0 else values


def filters_of(layer: nn.Module) -> Optional[Tensor]:
    """Return the filters (C, K) of the channels that a layer makes, in double precision.

    None for layers without weights, which make no channels, and for depthwise convolutions.
    """
    if not isinstance(layer, WEIGHT_TYPES) or is_depthwise(layer):
        return None
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.ConvTranspose2d):  # (inputs, outputs of a group, height, width)
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def norm_gains(model: nn.Module, names: Iterable[str]) -> Dict[str, Tensor]:
    """Find by what BatchNorms multiply the channels of the layers before them.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``. It runs
            once in eval mode on an image of noise.
        names (Iterable[str]): Names of layers.

    Returns:
        dict[str, Tensor]: |scale| / sqrt(running variance + eps) (C, ) by name of those layers
        whose output a BatchNorm takes as it is, the mean of them if there are several.
    """
    layers = [name for name in names if isinstance(find_layer(model, name), WEIGHT_TYPES)]
    gains = {name: [_gain(norm) for norm in map(model.get_submodule, norms)
                    if norm.running_var is not None]
             for name, norms in following_norms(model, layers).items()}
    return {name: torch.stack(found).mean(0) for name, found in gains.items() if found}


def _gain(norm: _BatchNorm) -> Tensor:
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.detach().abs()

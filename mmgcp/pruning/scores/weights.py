# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Criteria that look only at weights: scale factors of normalisation layers, and filters."""
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import following_norms
from mmgcp.nn.layers import NORM_TYPES, WEIGHT_TYPES, find_layer, is_depthwise, weight_by_output
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import BOOLEAN, checked, one_of

from .base import Criterion, Progress, unit_scores

FALLBACKS = ('weight_norm', 'keep')
NORMALIZATIONS = ('mean', 'max', 'none')


@TASK_UTILS.register_module()
class BNScale(Criterion):
    """Absolute scale factors of normalisation layers.

    From `network slimming <https://arxiv.org/abs/1708.06519>`_. Each normalisation layer in a
    channel unit votes with its own scale factors.

    Channels without scale factors (those of the neck and head of RetinaNet, and all of SSD) are
    ranked within their layer by the mean absolute weights of their filters. Each gets the scale
    factor that has the same relative rank in the whole model, so that one threshold serves all
    channels. In a model without normalisation the score is the relative rank itself.

    Args:
        without_norm (str): What to do with channels without scale factors: ``'weight_norm'``
            to score them as described, or ``'keep'`` to keep them all. Defaults to
            'weight_norm'.

    Raises:
        PruningError: ``without_norm`` is unknown.
    """

    @checked(PruningError, without_norm=one_of(*FALLBACKS))
    def __init__(self, without_norm: str = 'weight_norm'):
        self.without_norm = without_norm

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) by name of the layer, NaN for channels that it does not have.

        Layers with weights only score channels without scale factors.
        """
        scores = {}
        scaled = torch.zeros(unit.size, dtype=torch.bool)
        layers = [(item, find_layer(model, item.module)) for item in unit.side('out')]
        for item, layer in layers:
            if _has_scales(layer):
                scaled[item.unit_index] = True
                scores[item.module] = unit_scores(unit, item, layer.weight.abs())
        if bool(scaled.all()) or self.without_norm == 'keep':
            return scores
        for item, layer in layers:
            if isinstance(layer, WEIGHT_TYPES) and not bool(scaled[item.unit_index].all()):
                filters = weight_by_output(layer).detach().cpu().double().flatten(1)
                norms = filters.abs().mean(1)
                values = unit_scores(unit, item, _scales_of_ranks(model, norms))
                scores[item.module] = values.masked_fill(scaled, float('nan'))
        return scores


def _has_scales(layer: nn.Module) -> bool:
    return isinstance(layer, NORM_TYPES) and layer.weight is not None


def _scales_of_ranks(model: nn.Module, norms: Tensor) -> Tensor:
    """Return the scale factors (C, ) of the model that have the relative ranks of filters."""
    ranks = (norms.argsort(stable=True).argsort() + 0.5) / len(norms)
    scales = [module.weight.detach().abs().flatten().cpu() for module in model.modules()
              if _has_scales(module)]
    if not scales:
        return ranks
    scales = torch.cat(scales).sort().values
    return scales[(ranks * len(scales)).long()]


class FilterCriterion(Criterion):
    """Scores channels by the filters that produce them.

    A filter consists of all weights that an output channel of a convolution, transposed
    convolution or linear layer is computed with, without the bias. Each such layer of a channel
    unit votes with its own scores. Depthwise convolutions have no vote, as they only pass
    channels on. Layers behind a filter, such as a BatchNorm, make no difference unless
    ``fold_norm`` is set.

    As in the papers, all layers of a layer group lose the same share of their channels unless
    ``allocation='global'`` is set, as filters of different layers are hardly comparable.

    Args:
        normalize (str): What the values of a layer are divided by to make layers with different
            numbers and scales of weights comparable: their ``'mean'`` (so that 1 is an average
            channel), their ``'max'``, or nothing (``'none'``). Defaults to 'mean'.
        fold_norm (bool): Multiply each filter by |scale| / sqrt(variance + eps) of the BatchNorm
            that reads the layer's output, so that the scale of the filters themselves makes no
            difference. If several BatchNorms read it (in heads whose levels share
            convolutions), by the mean of their factors. To find them, the model runs once on
            noise. Defaults to False.

    Raises:
        PruningError: ``normalize`` is unknown.
    """

    default_allocation = 'uniform'

    @checked(PruningError, normalize=one_of(*NORMALIZATIONS), fold_norm=BOOLEAN)
    def __init__(self, normalize: str = 'mean', fold_norm: bool = False):
        self.normalize = normalize
        self.fold_norm = fold_norm
        self._gains: Dict[str, Tensor] = {}

    def measure(self, filters: Tensor) -> Tensor:
        """Return nonnegative values (C, ) of filters (C, K) in double precision."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Find the BatchNorms that follow the layers, if they are to be folded."""
        if self.fold_norm:
            layers = [item.module for unit in units for item in unit.side('out')
                      if isinstance(find_layer(model, item.module), WEIGHT_TYPES)]
            self._gains = _norm_gains(model, layers)

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) by name of the layer, NaN for channels that it does not produce."""
        scores = {}
        for item in unit.side('out'):
            layer = find_layer(model, item.module)
            if isinstance(layer, WEIGHT_TYPES) and not is_depthwise(layer):
                filters = weight_by_output(layer).detach().double().flatten(1)
                if item.module in self._gains:
                    filters = filters * self._gains[item.module][:, None]
                values = self.measure(filters)
                scale = values.mean() if self.normalize == 'mean' else values.max()
                if self.normalize != 'none' and scale > 0:
                    values = values / scale
                scores[item.module] = unit_scores(unit, item, values)
        return scores

    def join_branches(self, scores: Tensor) -> Tensor:
        """Return the root of the mean of squares (C, ) of (B, C), of the sum without ``normalize``.

        So a normalised score of 1 is still an average channel.
        """
        squares = scores.square()
        return (squares.sum(0) if self.normalize == 'none' else squares.mean(0)).sqrt()


@TASK_UTILS.register_module()
class L1Norm(FilterCriterion):
    """The sum of the absolute weights of a filter: s = sum |K|.

    From `Pruning Filters for Efficient ConvNets <https://arxiv.org/abs/1608.08710>`_, section
    3.1. For the arguments see :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the sums of absolute weights (C, ) of filters (C, K)."""
        return filters.abs().sum(1)


@TASK_UTILS.register_module()
class L2Norm(FilterCriterion):
    """The Euclidean norm of a filter.

    This is the lp-norm of `Soft Filter Pruning <https://arxiv.org/abs/1808.06866>`_ with p = 2.
    For the arguments see :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the Euclidean norms (C, ) of filters (C, K)."""
        return filters.square().sum(1).sqrt()


@TASK_UTILS.register_module()
class FPGM(FilterCriterion):
    """The sum of the distances of a filter F_i to all others of its layer: sum_j |F_i - F_j|.

    From `Filter Pruning via Geometric Median <https://arxiv.org/abs/1811.00250>`_. It is lowest
    for the filters closest to the geometric median, which the others can replace best, not for
    those with small weights. Filters of all groups of a grouped convolution are compared with
    each other. For the arguments see :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the sums of Euclidean distances (C, ) of filters (C, K)."""
        return torch.cdist(filters, filters).sum(1)


def _norm_gains(model: nn.Module, layers: Iterable[str]) -> Dict[str, Tensor]:
    """Return the factors (C, ) that BatchNorms multiply the outputs of layers by.

    Layers that no BatchNorm follows are left out; several BatchNorms are averaged.
    """
    gains: Dict[str, Tensor] = {}
    for layer, names in following_norms(model, layers).items():
        norms = [norm for norm in map(model.get_submodule, names) if norm.running_var is not None]
        found = [(norm.running_var.double() + norm.eps).rsqrt()
                 * (1 if norm.weight is None else norm.weight.detach().abs()) for norm in norms]
        if found:
            gains[layer] = torch.stack(found).mean(0)
    return gains

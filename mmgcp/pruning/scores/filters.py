# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Criteria that look only at the filters of the layers."""
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import following_norms
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, is_depthwise, weight_by_output
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, Progress, unit_scores

NORMALIZATIONS = ('mean', 'max', 'none')


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
        normalize (str): Layers differ in the number and scale of their weights. To make them
            comparable, the values of a layer are divided by their ``'mean'`` (so that 1 is an
            average channel), by their ``'max'``, or by nothing (``'none'``). Defaults to
            'mean'.
        fold_norm (bool): Multiply each filter by |scale| / sqrt(variance + eps) of the BatchNorm
            that reads the layer's output, so that the scale of the filters themselves makes no
            difference. If several BatchNorms read it (in heads whose levels share
            convolutions), by the mean of their factors. To find them, the model runs once on
            noise. Defaults to False.

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
        """Return nonnegative values (C, ) of filters (C, K) in double precision."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Find the BatchNorms that follow the layers, if they are to be folded."""
        if self.fold_norm:
            self._gains = _norm_gains(model, {item.module for unit in units
                                              for item in unit.side('out')})

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) by name of the layer, NaN for channels that it does not produce."""
        scores = {}
        for item in unit.side('out'):
            layer = find_layer(model, item.module)
            if isinstance(layer, WEIGHT_TYPES) and not is_depthwise(layer):
                filters = weight_by_output(layer).detach().double().flatten(1)
                if item.module in self._gains:
                    filters = filters * self._gains[item.module][:, None]
                values = self._normalized(self.measure(filters))
                scores[item.module] = unit_scores(unit, item, values)
        return scores

    def _normalized(self, values: Tensor) -> Tensor:
        """Divide values (C, ) by the scale of their layer, unless all are zero."""
        if self.normalize == 'none':
            return values
        scale = values.mean() if self.normalize == 'mean' else values.max()
        return values / scale if scale > 0 else values


@TASK_UTILS.register_module()
class L1Norm(FilterCriterion):
    """The sum of the absolute weights of a filter (`Pruning Filters for Efficient ConvNets
    <https://arxiv.org/abs/1608.08710>`_, section 3.1: s = sum |K|).

    Args:
        normalize (str), fold_norm (bool): See :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the sums of absolute weights (C, ) of filters (C, K)."""
        return filters.abs().sum(1)


@TASK_UTILS.register_module()
class L2Norm(FilterCriterion):
    """The Euclidean norm of a filter (`Soft Filter Pruning <https://arxiv.org/abs/1808.06866>`_,
    its lp-norm with p = 2).

    Args:
        normalize (str), fold_norm (bool): See :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the Euclidean norms (C, ) of filters (C, K)."""
        return filters.square().sum(1).sqrt()


@TASK_UTILS.register_module()
class FPGM(FilterCriterion):
    """The sum of the distances of a filter to all others of its layer (`Filter Pruning via
    Geometric Median <https://arxiv.org/abs/1811.00250>`_: sum_j' |F_j - F_j'|).

    It is lowest for the filters closest to the geometric median, which the others can replace
    best, not for those with small weights. Filters of all groups of a grouped convolution are
    compared with each other.

    Args:
        normalize (str), fold_norm (bool): See :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the sums of Euclidean distances (C, ) of filters (C, K)."""
        return torch.cdist(filters, filters).sum(1)


def _norm_gains(model: nn.Module, names: Iterable[str]) -> Dict[str, Tensor]:
    """Return the factors (C, ) that BatchNorms multiply the outputs of layers by.

    Layers that no BatchNorm follows are left out; several BatchNorms are averaged.
    """
    layers = [name for name in names if isinstance(find_layer(model, name), WEIGHT_TYPES)]
    gains = {name: [_gain(norm) for norm in map(model.get_submodule, norms)
                    if norm.running_var is not None]
             for name, norms in following_norms(model, layers).items()}
    return {name: torch.stack(found).mean(0) for name, found in gains.items() if found}


def _gain(norm: _BatchNorm) -> Tensor:
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    return gain if norm.weight is None else gain * norm.weight.detach().abs()

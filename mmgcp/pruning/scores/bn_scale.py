# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, Optional

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import NORM_TYPES, WEIGHT_TYPES, find_layer
from mmgcp.pruning.units import ChannelSlice, ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, as_row

FALLBACKS = ('weight_norm', 'keep')


@TASK_UTILS.register_module()
class BNScale(Criterion):
    """The absolute scale factors of the normalisation layers (`network slimming
    <https://arxiv.org/abs/1708.06519>`_).

    A criterion scores the channels of a channel unit, in each layer by itself; the
    planner compares a layer's scores with the threshold of the layer's group and
    merges the verdicts of the coupled layers.

    Channels that no normalisation scales (in RetinaNet's neck and head, in all of SSD) are
    ranked within their layer by the mean absolute weights of their filters, and get the
    scale factor that has this rank in the model, so that one threshold serves both. In
    a model without normalisation they get their rank, as a share of the channels.

    Args:
        without_norm (str): What to do with channels that no normalisation scales:
            ``'weight_norm'`` as said, or ``'keep'`` them all. Defaults to 'weight_norm'.
    """

    def __init__(self, without_norm: str = 'weight_norm'):
        if without_norm not in FALLBACKS:
            raise PruningError(f'without_norm must be one of {FALLBACKS}, but is {without_norm!r}')
        self.without_norm = without_norm

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Score the channels of a channel unit.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.

        Returns:
            dict[str, Tensor]: The scores (C, ) of each normalisation layer in the unit, and
            of the layers with weights for the other channels; NaN for channels that the
            layer does not have.
        """
        scores = {}
        scaled = torch.zeros(unit.size, dtype=torch.bool)
        for item in unit.side('out'):
            scales = _scales(model, item)
            if scales is not None:
                scaled[item.unit_index] = True
                scores[item.module] = as_row(unit, item, scales)
        if bool(scaled.all()) or self.without_norm == 'keep':
            return scores
        for item in unit.side('out'):
            norms = _filter_norms(model, item)
            if norms is not None and not bool(scaled[item.unit_index].all()):
                row = as_row(unit, item, _scales_of_rank(model, norms))
                scores[item.module] = row.masked_fill(scaled, float('nan'))
        return scores


def _scales(model: nn.Module, item: ChannelSlice) -> Optional[Tensor]:
    """The scale factors (C, ) of a normalisation layer, None for anything else."""
    layer = find_layer(model, item.module)
    if isinstance(layer, NORM_TYPES) and layer.weight is not None:
        return layer.weight.abs()
    return None


def _filter_norms(model: nn.Module, item: ChannelSlice) -> Optional[Tensor]:
    """The mean absolute weight (C, ) of each filter of a layer with weights."""
    layer = find_layer(model, item.module)
    if not isinstance(layer, WEIGHT_TYPES):
        return None
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.abs().flatten(1).mean(1)


def _scales_of_rank(model: nn.Module, norms: Tensor) -> Tensor:
    """The scale factors (C, ) that have the ranks of some filters."""
    shares = (norms.argsort().argsort() + 0.5) / len(norms)
    scales = [module.weight.detach().abs().flatten() for module in model.modules()
              if isinstance(module, NORM_TYPES) and module.weight is not None]
    if not scales:
        return shares
    scales = torch.cat(scales).sort().values
    return scales[(shares * len(scales)).long()]

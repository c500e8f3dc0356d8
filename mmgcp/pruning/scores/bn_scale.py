# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import NORM_TYPES, WEIGHT_TYPES, find_layer, weight_by_output
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, unit_scores

FALLBACKS = ('weight_norm', 'keep')


@TASK_UTILS.register_module()
class BNScale(Criterion):
    """The absolute scale factors of the normalisation layers (`network slimming
    <https://arxiv.org/abs/1708.06519>`_).

    Each normalisation layer in a channel unit votes with its own scale factors.

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

    def __init__(self, without_norm: str = 'weight_norm'):
        if without_norm not in FALLBACKS:
            raise PruningError(f'without_norm must be one of {FALLBACKS}, but is {without_norm!r}')
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
                norms = weight_by_output(layer).detach().abs().flatten(1).mean(1)
                values = unit_scores(unit, item, _scales_of_ranks(model, norms))
                scores[item.module] = values.masked_fill(scaled, float('nan'))
        return scores


def _has_scales(layer: nn.Module) -> bool:
    return isinstance(layer, NORM_TYPES) and layer.weight is not None


def _scales_of_ranks(model: nn.Module, norms: Tensor) -> Tensor:
    """Return the scale factors (C, ) of the model that have the relative ranks of filters."""
    ranks = (norms.argsort().argsort() + 0.5) / len(norms)
    scales = [module.weight.detach().abs().flatten() for module in model.modules()
              if _has_scales(module)]
    if not scales:
        return ranks
    scales = torch.cat(scales).sort().values
    return scales[(ranks * len(scales)).long()]

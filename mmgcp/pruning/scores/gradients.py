# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Criteria that estimate how the loss changes without a channel from its gradients."""
from functools import partial
from typing import Dict, Iterable, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels
from mmgcp.nn.training_loss import Batch, loss_mode
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, Progress
from .channel_gates import ChannelGates, scoring_batches

SAVINGS = (None, 'memory', 'flops')


@TASK_UTILS.register_module()
class Taylor(Criterion):
    """The first-order change of the loss without a channel (`Importance Estimation for Neural
    Network Pruning <https://arxiv.org/abs/1906.10771>`_, its importance
    (dE/dz)^2 = (sum_s g_s w_s)^2 of a gate z).

    With a gate z = 1 that multiplies a channel in all its consumers, setting z = 0 changes the
    loss by -dL/dz to first order: the sum of activation times gradient over all spatial
    positions and all consumers in the channel unit. The importance of the channel is the mean
    of (dL/dz)^2 over the images. Its score is the square root of the importance, divided by
    the mean of these roots over all channels of the model: so scores of all units are
    comparable, 1 is an average channel, and the squared score, which a budget is spent by, is
    proportional to the importance.

    L is the sum of the detector's losses for a whole batch, and dL/dz is the share of each
    image in it. If that loss is a mean over the images, as in MMDetection, the images of
    a smaller last batch weigh more; a common factor makes no difference. Behind the pooling
    of regions in two-stage detectors dL/dz is that of the whole batch.

    Channels that the images do not need score zero: if no object in the images belongs to a
    level of the detector, the layers that regress its boxes are removed first. So take
    enough images.
    """
    needs = 'losses'

    def __init__(self):
        self._scores: Dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Run all batches once forwards and backwards; see the base."""
        sums, images = squared_gradients(model, units, batches, progress)
        self._scores = relative_roots({name: values / images for name, values in sums.items()})

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) by the name of a unit; none if no loss depends on it."""
        return {unit.name: self._scores[unit.name]} if unit.name in self._scores else {}


@TASK_UTILS.register_module()
class GroupFisher(Taylor):
    """The Fisher information of a channel's gate, divided by what the channel costs (`Group
    Fisher Pruning <https://arxiv.org/abs/2108.00708>`_: 1/2 sum_n (dL_n/dm)^2 with the mask m
    shared by coupled channels, divided by their memory).

    With a gate z = 1 that multiplies a channel in all its consumers, half of the sum of
    (dL/dz)^2 over the images approximates the second-order change of the loss for z = 0. It is
    divided by what removing the channel saves. The score is the square root of the quotient,
    divided by the mean of these roots over all channels of the model, for the reasons given
    in :class:`Taylor`, which also explains L and what is different in two-stage detectors.

    Without ``normalize`` the order of the channels is that of :class:`Taylor`.

    Args:
        normalize (str, optional): What a channel costs for an image: ``'memory'`` for the
            elements of the outputs of the unit's convolutions and linear layers, as in the
            paper; ``'flops'`` for the MACs of all layers that produce or read it; None for
            nothing. A budget weighs the costs of the layer groups in any case. Defaults to
            'memory'.

    Raises:
        PruningError: ``normalize`` is unknown.
    """

    def __init__(self, normalize: Optional[str] = 'memory'):
        super().__init__()
        if normalize not in SAVINGS:
            raise PruningError(f'normalize must be one of {SAVINGS}, but is {normalize!r}')
        self.normalize = normalize

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Run all batches once forwards and backwards; see the base."""
        layers = {item.module: find_layer(model, item.module)
                  for unit in units for item in unit.slices}
        layers = {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHT_TYPES)}
        costs = {name: dict(memory=0, flops=0) for name in layers}
        with on_outputs(model, {name: partial(_add_costs, costs[name], layer)
                                for name, layer in layers.items()}):
            sums, images = squared_gradients(model, units, batches, progress)
        importances = {name: values / 2 for name, values in sums.items()}
        if self.normalize is not None:
            for unit in units:
                if unit.name in importances:
                    importances[unit.name] /= self._savings(model, unit, costs) / images
        self._scores = relative_roots(importances)

    def _savings(self, model: nn.Module, unit: ChannelUnit,
                 costs: Dict[str, Dict[str, int]]) -> Tensor:
        """Return what removing each channel of a unit saves (C, )."""
        savings = torch.zeros(unit.size, dtype=torch.double)
        for item in unit.slices if self.normalize == 'flops' else unit.side('out'):
            if item.module in costs:
                channels = num_channels(find_layer(model, item.module), item.side)
                share = costs[item.module][self.normalize] / channels
                savings.index_add_(0, item.unit_index,
                                   savings.new_full(item.unit_index.shape, share))
        return savings


def _add_costs(costs: Dict[str, int], layer: nn.Module, inputs: Tensor, output: Tensor) -> None:
    """Add the output elements and the MACs of a run of a layer to its costs."""
    # The weights are applied at each position of one side of the layer
    side, name = (inputs, 'in') if isinstance(layer, nn.ConvTranspose2d) else (output, 'out')
    costs['memory'] += output.numel()
    costs['flops'] += layer.weight.numel() * side.numel() // num_channels(layer, name)


def squared_gradients(model: nn.Module, units: Sequence[ChannelUnit],
                      batches: Iterable[Batch],
                      progress: Progress) -> Tuple[Dict[str, Tensor], int]:
    """Sum the squared derivatives of the loss with respect to channel gates over all images.

    Args:
        model (nn.Module): The detector, left as it was, including the gradients of its weights.
        units (Sequence[ChannelUnit]): The units.
        batches (Iterable[Batch]): Training batches.
        progress (Callable): See :func:`scoring_batches`.

    Returns:
        tuple: The sums (C, ) in double precision by name of the unit, for those that the loss
        depends on, and the number of images. Channels that no layer reads have NaN. Units with
        a gate for the whole batch have the square of the sum over its images instead of
        the sum of squares: both have the same mean if the images' shares are independent.
    """
    gates, sums, images = ChannelGates(model, units), {}, 0
    with loss_mode(model):
        for batch in scoring_batches(batches, progress):
            images += len(batch.images)
            for name, values in gates.gradients(batch).items():
                sums[name] = sums.get(name, 0) + values.double().square().sum(0).cpu()
    return {name: values.masked_fill(~gates.read[name], float('nan'))
            for name, values in sums.items()}, images


def relative_roots(importances: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Turn importances, which add up like losses, into scores.

    A budget is spent by the squares of scores. So the score is the square root of the
    importance, divided by the mean of all roots, so that 1 is an average channel of the model.
    The order of the channels is that of the importances.

    Args:
        importances (dict[str, Tensor]): Importances (C, ) by name of the unit, NaN for
            channels that have none.

    Returns:
        dict[str, Tensor]: The scores (C, ).
    """
    roots = {name: values.sqrt() for name, values in importances.items()}
    mean = torch.cat([torch.zeros(0), *roots.values()]).nanmean()
    return {name: values / mean if mean > 0 else values for name, values in roots.items()}

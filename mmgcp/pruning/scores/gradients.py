# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Criteria that estimate how the loss changes without a channel from its gradients."""
from functools import partial
from typing import Dict, Iterable, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import numbered, sum_by_name, total_over_ranks
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels
from mmgcp.nn.training_loss import Batch, loss_mode, seed_batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import checked, one_of

from .base import Criterion, Progress, relative_roots
from .channel_gates import ChannelGates, scoring_batches

SAVINGS = (None, 'memory', 'flops')


@TASK_UTILS.register_module()
class Taylor(Criterion):
    """The first-order change of the loss without a channel.

    This is the importance (dE/dz)^2 = (sum_s g_s w_s)^2 of a gate z in `Importance Estimation
    for Neural Network Pruning <https://arxiv.org/abs/1906.10771>`_. With a gate z = 1 that
    multiplies a channel in all its consumers, setting z = 0 changes the loss by -dL/dz to first
    order: the sum of activation times gradient over all spatial positions and all consumers in
    the channel unit. The importance of the channel is the mean of (dL/dz)^2 over the images.
    Its score is the square root of the importance, divided by the mean of these roots over all
    channels of the model: so scores of all units are comparable, 1 is an average channel, and
    the squared score, which a budget is spent by, is proportional to the importance.

    L is the sum of the detector's losses for a whole batch, and dL/dz is the share of each
    image in it. If that loss is a mean over the images, as in MMDetection, the images of
    a smaller last batch weigh more; a common factor makes no difference. Behind the pooling
    of regions in two-stage detectors dL/dz is that of the whole batch.

    Channels that the images do not need score zero: if no object in the images belongs to a
    level of the detector, the layers that regress its boxes are removed first. So take
    enough images.
    """
    needs = 'losses'
    default_allocation = 'uniform'

    @checked(PruningError)
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
    """The Fisher information of a channel's gate, divided by what the channel costs.

    This is 1/2 sum_n (dL_n/dm)^2 with the mask m shared by coupled channels, divided by their
    memory, in `Group Fisher Pruning <https://arxiv.org/abs/2108.00708>`_. With a gate z = 1 that
    multiplies a channel in all its consumers, half of the sum of (dL/dz)^2 over the images
    approximates the second-order change of the loss for z = 0. It is divided by what removing
    the channel saves. The score is the square root of the quotient, divided by the mean of
    these roots over all channels of the model, for the reasons given in :class:`Taylor`, which
    also explains L and what is different in two-stage detectors.

    Without ``normalize`` the order of the channels is that of :class:`Taylor`.

    Args:
        normalize (str, optional): What a channel costs for an image: ``'memory'`` for the
            elements of the outputs of the unit's convolutions and linear layers, as in the
            paper; ``'flops'`` for the MACs of all layers that produce or read it; None for
            nothing. A budget weighs the costs of the layer groups in any case. Where every unit
            loses the same share, as with the allocation that is this criterion's default, only
            the order within a unit counts, and that hardly depends on it. Defaults to 'memory'.

    Raises:
        PruningError: ``normalize`` is unknown.
    """

    @checked(PruningError, normalize=one_of(*SAVINGS))
    def __init__(self, normalize: Optional[str] = 'memory'):
        super().__init__()
        self.normalize = normalize

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Run all batches once forwards and backwards; see the base."""
        layers = {item.module: find_layer(model, item.module)
                  for unit in units for item in unit.slices}
        costs = {name: 0 for name, layer in layers.items() if isinstance(layer, WEIGHT_TYPES)}

        def add_cost(name: str, inputs: Tensor, output: Tensor) -> None:
            costs[name] += (output.numel() if self.normalize == 'memory'
                            else _count_macs(layers[name], inputs, output))

        with on_outputs(model, {name: partial(add_cost, name) for name in costs}):
            sums, images = squared_gradients(model, units, batches, progress)
        costs = sum_by_name(costs)
        importances = {name: values / 2 for name, values in sums.items()}
        for unit in units if self.normalize is not None else ():
            if unit.name in importances:
                savings = torch.zeros(unit.size, dtype=torch.double)
                for item in unit.slices if self.normalize == 'flops' else unit.side('out'):
                    share = costs.get(item.module, 0) / num_channels(layers[item.module], item.side)
                    savings.index_add_(0, item.unit_index,
                                       savings.new_full(item.unit_index.shape, share))
                importances[unit.name] /= savings / images
        self._scores = relative_roots(importances)


def _count_macs(layer: nn.Module, inputs: Tensor, output: Tensor) -> int:
    """Count the MACs of a run of a layer, which applies its weights at each position of a side."""
    side, name = (inputs, 'in') if isinstance(layer, nn.ConvTranspose2d) else (output, 'out')
    return layer.weight.numel() * side.numel() // num_channels(layer, name)


def squared_gradients(model: nn.Module, units: Sequence[ChannelUnit], batches: Iterable[Batch],
                      progress: Progress) -> Tuple[Dict[str, Tensor], int]:
    """Sum the squared derivatives of the loss with respect to channel gates over all images.

    These are the images of all ranks.

    Returns the sums (C, ) in double precision by name of the unit, for those that the loss
    depends on, and the number of images. Channels that no layer reads have NaN. Units with a
    gate for the whole batch have the square of the sum over its images instead of the sum of
    squares: both have the same mean if the images' shares are independent.
    """
    gates, sums, images = ChannelGates(model, units), {}, 0
    with loss_mode(model):
        for number, batch in numbered(scoring_batches(batches, progress)):
            images += len(batch.images)
            seed_batch(model, number)
            for name, values in gates.gradients(batch).items():
                sums[name] = sums.get(name, 0) + values.double().square().sum(0).cpu()
    sums, read = sum_by_name(sums), sum_by_name(gates.read)
    return {name: values.masked_fill(~read[name], float('nan'))
            for name, values in sums.items()}, total_over_ranks(images)

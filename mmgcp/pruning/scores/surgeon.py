# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Optimal Brain Surgeon for channels: what is lost once the layers that stay make up for them."""
import math
from functools import partial
from typing import Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import numbered, sum_over_ranks, total_over_ranks
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.nn.sampling import DrawnPlaces
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode, seed_batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import checked, number_in

from .base import Criterion, Progress, relative_roots
from .channel_gates import scoring_batches
from .readers import Reader, make_readers

# Places of an image at which the inputs of each layer are seen
PLACES = 64
# All units lose equal shares of their channels, in so many steps
STEPS = 16


@TASK_UTILS.register_module()
class OBS(Criterion):
    """The error that is left without a channel once all others have made up for it.

    `Optimal Brain Surgeon <https://doi.org/10.1109/ICNN.1993.298572>`_ with the layer-wise
    Hessian of structured pruning (`ZipLM, arXiv 2302.04089 <https://arxiv.org/abs/2302.04089>`_):
    without the columns c of its kernel W and with the best new values of all others, the outputs
    of a layer have the squared error

        sum_o f_o W_oc [(G^-1)_cc]^-1 W_oc'

    where G is the covariance of its inputs (with a ridge), c stands for
    the taps of one input channel, and f_o is the squared derivative of the loss with respect
    to output o, summed over the positions of an image and averaged over the images: the
    empirical Fisher information, which makes layers comparable. Errors of all layers that read a
    channel are added. The channels with the least error go first, a share of each
    unit at a time, then G and W are those without them, and outputs that went no longer count.
    A channel's score is the root of its error when it goes, divided by the mean of
    all, and no less than those of its unit that went before.

    Where a kernel has too many taps and channels, those of a channel are taken as uncorrelated.

    Args:
        ridge (float): Share of the mean variance of the inputs that is added to each. Defaults
            to 0.01.
    """
    needs = 'losses'
    default_allocation = 'measured'

    @checked(PruningError, ridge=number_in(0, 1e6, open_low=True))
    def __init__(self, ridge: float = 1e-2):
        self.ridge = ridge
        self._scores: Dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Run all batches once forwards and backwards, and eliminate channels; see the base."""
        names = {item.module for unit in units for item in unit.slices
                 if isinstance(find_layer(model, item.module), WEIGHT_TYPES)}
        readers = {name: make_readers(model.get_submodule(name)) for name in sorted(names)}
        _see_batches(model, readers, batches, progress)
        for reader in (reader for found in readers.values() for reader in found):
            reader.begin(self.ridge)
        costs = _Elimination(units, readers, progress).run()
        self._scores = relative_roots(costs)

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) by the name of a unit; none if no layer reads it."""
        return {unit.name: self._scores[unit.name]} if unit.name in self._scores else {}


def _see_batches(model: nn.Module, readers: Dict[str, List[Reader]], batches: Iterable[Batch],
                 progress: Progress) -> None:
    """Sum inputs and squared gradients of layers over the images of all ranks."""
    def see(name, inputs, output):
        inputs = inputs.detach()
        for reader in readers[name]:
            reader.see(inputs, output, places)
        if output.requires_grad:
            output.register_hook(partial(see_gradient, name))

    def see_gradient(name, gradient):
        for reader in readers[name]:
            reader.see_gradient(gradient)

    count = 0
    with on_outputs(model, {name: partial(see, name) for name in readers}), loss_mode(model):
        for number, batch in numbered(scoring_batches(batches, progress)):
            size = len(batch.images)
            places = DrawnPlaces(range(number * size, (number + 1) * size), PLACES)
            count += size
            seed_batch(model, number)
            inputs = batch.images.detach().clone().requires_grad_()
            loss = detection_loss(model, batch._replace(images=inputs))
            if not bool(loss.isfinite()):
                raise PruningError(f'the loss of a batch of training data is {float(loss)}; are '
                                   'the weights those of a trained detector?')
            torch.autograd.grad(loss, inputs, allow_unused=True)
    count = total_over_ranks(count)
    for reader in (reader for name in sorted(readers) for reader in readers[name]):
        reader.join(sum_over_ranks, count)


class _Elimination:
    """Removes the channels of all units step by step, those first that are missed least."""

    def __init__(self, units: Sequence[ChannelUnit], readers: Dict[str, List[Reader]],
                 progress: Progress):
        self.units, self.readers, self.progress = units, readers, progress
        self.left = {unit.name: torch.ones(unit.size, dtype=torch.bool) for unit in units}
        self.costs = {unit.name: torch.full((unit.size, ), math.nan, dtype=torch.double)
                      for unit in units}
        self.highest = dict.fromkeys(self.left, 0.)

    def run(self) -> Dict[str, Tensor]:
        """Return the costs (C, ) of the channels of units, by their names, when they go."""
        for step in range(1, STEPS + 1):
            self.progress('eliminating', step, STEPS)
            for unit in self.units:
                goal = round(unit.size * step / STEPS)
                self._remove(unit, goal - int((~self.left[unit.name]).sum()))
        return {name: costs for name, costs in self.costs.items() if not costs.isnan().all()}

    def _remove(self, unit: ChannelUnit, number: int) -> None:
        """Remove so many channels of a unit."""
        if number <= 0:
            return
        costs = self._costs(unit)
        values, channels = costs.masked_fill(costs.isnan(), 0.).masked_fill(
            ~self.left[unit.name], math.inf).sort(stable=True)
        values, channels = values[:number], channels[:number]
        values = values.clamp(min=self.highest[unit.name])
        self.highest[unit.name] = float(values[-1])
        self.costs[unit.name][channels] = values.masked_fill(costs[channels].isnan(), math.nan)
        self.left[unit.name][channels] = False
        mask = unit.mask(channels)
        for item in unit.slices:
            for reader in self.readers.get(item.module, ()):
                reader.remove(item.select(mask), item.side)

    def _costs(self, unit: ChannelUnit) -> Tensor:
        """Return what it costs to remove each channel (C, ) of a unit, NaN if nobody reads it."""
        costs = torch.full((unit.size, ), math.nan, dtype=torch.double)
        for item in unit.side('in'):
            for reader in self.readers.get(item.module, ()):
                found = reader.costs()[item.channels.to(reader.device)].cpu()
                old = costs[item.unit_index]
                costs[item.unit_index] = torch.where(
                    old.isnan(), found, old + found.nan_to_num(nan=0.))
        return costs

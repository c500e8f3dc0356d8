# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Seeing channels of channel units where layers read them, over training batches."""
from functools import partial
from operator import length_hint
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import total_over_ranks
from mmgcp.nn.hooks import on_inputs
from mmgcp.nn.training_loss import Batch, detection_loss
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

from .base import Progress

# Slices of the inputs of one layer, with the units that they belong to
Reads = List[Tuple[ChannelUnit, ChannelSlice]]


def scoring_batches(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    """Yield batches and report them as progress 'scoring'.

    None at all, on any rank, are a PruningError; so all ranks have to go through theirs.
    """
    number, total = 0, length_hint(batches)
    progress('scoring', 0, total)
    for number, batch in enumerate(batches, 1):
        if not bool(batch.images.isfinite().all()):
            raise PruningError(f'batch {number} of the training data has pixels that are not '
                               'finite')
        yield batch
        progress('scoring', number, max(number, total))
    if not total_over_ranks(number):
        raise PruningError('there are no batches of training data to score channels with')
    if number < total:  # fewer batches than announced
        progress('scoring', number, number)


def on_unit_inputs(model: nn.Module, units: Iterable[ChannelUnit],
                   function: Callable[[Reads, int, Tensor], Any]) -> ContextManager[None]:
    """Call a function with what the consumers of channel units read, before they run.

    The function takes the slices that a layer reads, the dimension of the channels in its input,
    and the input. What it returns replaces the input, unless it is None.
    """
    reads: Dict[str, Reads] = {}
    for unit in units:
        for item in unit.side('in'):
            reads.setdefault(item.module, []).append((unit, item))
    dims = {name: -1 if isinstance(model.get_submodule(name), nn.Linear) else 1 for name in reads}
    return on_inputs(model, {name: partial(function, found, dims[name])
                             for name, found in reads.items()})


class ChannelGates:
    """Factors of one that multiply the channels of channel units in all their consumers.

    Each channel of a unit has a gate for each image of a batch. The derivative of the loss
    with respect to it is the sum of activation times gradient over all spatial positions, all
    consumers of the channel and all their runs. Consumers whose inputs are not one map for each
    image (behind the pooling of regions in two-stage detectors) have one gate for the whole
    batch.

    The attribute ``read`` has masks (C, ) of the channels that any layer has read so far, by
    name of the unit.
    """

    def __init__(self, model: nn.Module, units: Sequence[ChannelUnit]):
        self.model = model
        self.units = units
        self.read: Dict[str, Tensor] = {}
        self._num_images = 0
        self._gates: Dict[Tuple[str, int], Tensor] = {}  # by name of the unit, and their number

    def gradients(self, batch: Batch) -> Dict[str, Tensor]:
        """Compute the derivatives of the loss of N images with respect to the gates.

        Call it in :func:`mmgcp.nn.training_loss.loss_mode`. Returns derivatives (N, C) by name of
        the unit, or (1, C), the sums over the images, for units with a gate for the whole batch.
        Units that the loss does not depend on are left out. Raises a PruningError if the loss or
        a derivative is not a finite number.
        """
        self._num_images = len(batch.images)
        self._gates.clear()
        with on_unit_inputs(self.model, self.units, self._multiply):
            loss = detection_loss(self.model, batch)
        gates = dict(self._gates) if loss.requires_grad else {}
        values = torch.autograd.grad(loss, list(gates.values()), allow_unused=True) if gates else ()
        self._gates.clear()
        found: Dict[str, Tensor] = {}
        for (name, _), value in zip(gates, values):
            if value is not None and name in found:  # (N, C) and (1, C) can only be added as (1, C)
                value = found[name].sum(0, keepdim=True) + value.sum(0, keepdim=True)
            if value is not None:
                found[name] = value
        if not all(bool(value.isfinite().all()) for value in (loss, *found.values())):
            raise PruningError(f'the loss of a batch of training data is {float(loss)} and has no '
                               'finite derivatives; are the weights those of a trained detector?')
        return found

    def _multiply(self, reads: Reads, dim: int, inputs: Tensor) -> Tensor:
        """Multiply the inputs of a layer by the gates of their channels."""
        number = self._num_images if len(inputs) == self._num_images else 1
        factors = inputs.new_ones(number, inputs.shape[dim])
        for unit, item in reads:
            key = unit.name, number
            if key not in self._gates:
                self._gates[key] = inputs.new_ones(number, unit.size).requires_grad_()
                self.read.setdefault(unit.name, torch.zeros(unit.size, dtype=torch.bool))
            self.read[unit.name][item.unit_index] = True
            factors = factors.index_copy(1, item.channels.to(inputs.device),
                                         self._gates[key][:, item.unit_index.to(inputs.device)])
        shape = [1] * inputs.dim()
        shape[0], shape[dim] = factors.shape
        return inputs * factors.view(shape)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Looking at the channels of channel units where layers read them, over training batches."""
from contextlib import contextmanager
from operator import length_hint
from typing import Callable, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.hooks import hooked
from mmgcp.nn.layers import find_layer
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

from .base import Progress

# Slices of the inputs of one layer, with the units that they belong to
Reads = List[Tuple[ChannelUnit, ChannelSlice]]


def scoring_batches(batches: Iterable[Batch], progress: Progress) -> Iterator[Batch]:
    """Yield batches and report them as progress of the stage 'scoring'.

    Raises:
        PruningError: There are none.
    """
    number, total = 0, length_hint(batches)
    progress('scoring', 0, total)
    for number, batch in enumerate(batches, 1):
        yield batch
        progress('scoring', number, max(number, total))
    if not number:
        raise PruningError('there are no batches of training data to score channels with')
    if number < total:  # the data ended before
        progress('scoring', number, number)


@contextmanager
def hooked_readers(model: nn.Module, units: Iterable[ChannelUnit],
                   make_hook: Callable[[int, Reads], Callable]) -> Iterator[None]:
    """Hook the layers that read channel units for a while, before they run.

    Args:
        model (nn.Module): The model.
        units (Iterable[ChannelUnit]): The units.
        make_hook (Callable): Makes a forward pre-hook of the dimension of a layer's input
            that has the channels, and of what the layer reads.
    """
    reads: Dict[str, Reads] = {}
    for unit in units:
        for item in unit.side('in'):
            reads.setdefault(item.module, []).append((unit, item))
    handles = []
    for name, found in reads.items():
        layer = find_layer(model, name)
        dim = -1 if isinstance(layer, nn.Linear) else 1
        handles.append(layer.register_forward_pre_hook(make_hook(dim, found)))
    with hooked(handles):
        yield


class ChannelGates:
    """Factors of one for the channels of channel units, in all layers that read them.

    A gate is there for each channel of a unit and each image of a batch, and the derivative
    of the loss for it is the sum of activation times gradient over all positions of all
    readers of the channel, however often they run. Readers that do not get one map an image
    (behind the pooling of regions in two-stage detectors) have a gate for the whole batch.

    Args:
        model (nn.Module): The model.
        units (Sequence[ChannelUnit]): The units.

    Attributes:
        read (dict[str, Tensor]): Masks (C, ) by name of the unit: the channels that a layer has
            read so far.
    """

    def __init__(self, model: nn.Module, units: Sequence[ChannelUnit]):
        self.model = model
        self.units = units
        self.read: Dict[str, Tensor] = {}
        self._num_images = 0
        self._gates: Dict[Tuple[str, int], Tensor] = {}  # by name of the unit, and rows

    def gradients(self, batch: Batch) -> Dict[str, Tensor]:
        """Compute the derivatives of the loss of a batch for the gates.

        To be used in :func:`mmgcp.nn.training_loss.loss_mode`.

        Args:
            batch (Batch): N images.

        Returns:
            dict[str, Tensor]: Derivatives (N, C) by name of the unit, or (1, C), the sums over
            the images, for units with a gate for the whole batch. Sets that the loss does
            not depend on have none.

        Raises:
            PruningError: The loss or a derivative is not a finite number.
        """
        self._num_images = len(batch.images)
        self._gates.clear()
        with hooked_readers(self.model, self.units, self._hook):
            loss = detection_loss(self.model, batch)
        gates = dict(self._gates) if loss.requires_grad else {}
        values = torch.autograd.grad(loss, list(gates.values()), allow_unused=True) if gates else ()
        self._gates.clear()
        found: Dict[str, Tensor] = {}
        for (name, _), value in zip(gates, values):
            if value is not None:
                found[name] = _added(found[name], value) if name in found else value
        if not all(bool(value.isfinite().all()) for value in (loss, *found.values())):
            raise PruningError(f'the loss of a batch of training data is {float(loss)} and has no '
                               'finite derivatives; are the weights those of a trained detector?')
        return found

    def _hook(self, dim: int, reads: Reads) -> Callable:
        def hook(_, args):
            inputs = args[0]
            rows = self._num_images if len(inputs) == self._num_images else 1
            factors = inputs.new_ones(rows, inputs.shape[dim])
            for unit, item in reads:
                key = unit.name, rows
                if key not in self._gates:
                    self._gates[key] = inputs.new_ones(rows, unit.size).requires_grad_()
                    self.read.setdefault(unit.name, torch.zeros(unit.size, dtype=torch.bool))
                self.read[unit.name][item.unit_index] = True
                factors = factors.index_copy(1, item.channels.to(inputs.device),
                                             self._gates[key][:, item.unit_index.to(inputs.device)])
            shape = [1] * inputs.dim()
            shape[0], shape[dim] = factors.shape
            return (inputs * factors.view(shape), *args[1:])
        return hook


def _added(first: Tensor, second: Tensor) -> Tensor:
    """The sum of derivatives (N, C) and (1, C), which can only be (1, C)."""
    return first.sum(0, keepdim=True) + second.sum(0, keepdim=True)


def squared_gradients(model: nn.Module, units: Sequence[ChannelUnit],
                      batches: Iterable[Batch],
                      progress: Progress) -> Tuple[Dict[str, Tensor], int]:
    """Sum the squared derivatives of the loss for channel gates over all images.

    Args:
        model (nn.Module): The detector; stays as it is, also the gradients of its weights.
        units (Sequence[ChannelUnit]): The units.
        batches (Iterable[Batch]): Training batches.
        progress (Callable): See :func:`scoring_batches`.

    Returns:
        tuple: The sums (C, ) in double precision by name of the unit, for those that the loss
        depends on, and the number of images. Channels that no layer reads have NaN. Sets with
        a gate for the whole batch have the square of the sum over its images in place of
        the sum of squares; both are alike on average if the images' shares are independent.
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

    The planner takes the square of a score for what a channel costs; see
    :func:`mmgcp.pruning.budget.find_thresholds`. So the score is the root of the importance,
    divided by the mean of all roots, so that 1 is an average channel of the model. The
    order of the channels is that of the importances.

    Args:
        importances (dict[str, Tensor]): Importances (C, ) by name of the unit, NaN for
            channels that have none.

    Returns:
        dict[str, Tensor]: The scores (C, ).
    """
    roots = {name: values.sqrt() for name, values in importances.items()}
    mean = torch.cat([torch.zeros(0), *roots.values()]).nanmean()
    return {name: values / mean if mean > 0 else values for name, values in roots.items()}

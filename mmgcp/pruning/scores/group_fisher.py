# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.hooks import hooked
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, num_channels
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, Progress
from .channel_gates import relative_roots, squared_gradients

SAVINGS = (None, 'memory', 'flops')


@TASK_UTILS.register_module()
class GroupFisher(Criterion):
    """The Fisher information of a channel's gate, for what the channel saves (`Group Fisher
    Pruning <https://arxiv.org/abs/2108.00708>`_, its 1/2 sum_n (dL_n/dm)^2, with the mask m
    shared by coupled channels, over their memory).

    With a gate z = 1 that multiplies a channel of a channel unit in all layers that read it,
    half of the sum of (dL/dz)^2 over the images stands for the second order of the loss's
    change at z = 0. It is divided by what the channel saves. The score is the root of that in
    relation to the mean of all channels of the model, for the reasons given in
    :class:`Taylor`, which also says what L is and what holds for two-stage detectors.

    Without normalisation the order of the channels is that of :class:`Taylor`.

    Args:
        normalize (str, optional): ``'memory'`` for the elements of the outputs of the unit's
            convolutions and linear layers that a channel takes for an image, as in the
            paper; ``'flops'`` for the MACs for an image of all
            layers that make or read it; None for nothing. Between layer groups a budget
            weighs what channels save in any case. Defaults to 'memory'.

    Raises:
        PruningError: ``normalize`` is unknown.
    """
    needs = 'losses'

    def __init__(self, normalize: Optional[str] = 'memory'):
        if normalize not in SAVINGS:
            raise PruningError(f'normalize must be one of {SAVINGS}, but is {normalize!r}')
        self.normalize = normalize
        self._scores: Dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Go through the batches once, forwards and backwards; see the base."""
        with _counted(model, units) as counts:
            sums, images = squared_gradients(model, units, batches, progress)
        importances = {name: values / 2 for name, values in sums.items()}
        if self.normalize is not None:
            for unit in units:
                if unit.name in importances:
                    saved = self._saved(model, unit, counts) / images
                    importances[unit.name] /= saved
        self._scores = relative_roots(importances)

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return the scores (C, ) by the name of a unit of size C; none if no loss sees it."""
        return {name: row for name, row in self._scores.items() if name == unit.name}

    def _saved(self, model: nn.Module, unit: ChannelUnit,
               counts: Dict[str, Dict[str, float]]) -> Tensor:
        """What each channel (C, ) of a unit saves."""
        saved = torch.zeros(unit.size, dtype=torch.double)
        for item in unit.slices if self.normalize == 'flops' else unit.side('out'):
            if item.module in counts:
                channels = num_channels(find_layer(model, item.module), item.side)
                share = counts[item.module][self.normalize] / channels
                saved.index_add_(0, item.unit_index, saved.new_full(item.unit_index.shape, share))
        return saved


@contextmanager
def _counted(model: nn.Module,
             units: Sequence[ChannelUnit]) -> Iterator[Dict[str, Dict[str, float]]]:
    """Yield a dictionary that counts the outputs and MACs of layers in all their runs."""
    counts: Dict[str, Dict[str, float]] = {}

    def make_hook(name):
        def hook(layer, args, output):
            # The weights are applied at each position of one side of the layer
            side = args[0] if isinstance(layer, nn.ConvTranspose2d) else output
            channels = num_channels(layer, 'in' if side is args[0] else 'out')
            count = counts.setdefault(name, dict(memory=0, flops=0))
            count['memory'] += output.numel()
            count['flops'] += layer.weight.numel() * side.numel() // channels
        return hook

    layers = {item.module: find_layer(model, item.module)
              for unit in units for item in unit.slices}
    handles = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()
               if isinstance(layer, WEIGHT_TYPES)]
    with hooked(handles):
        yield counts

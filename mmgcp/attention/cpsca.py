# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from dataclasses import dataclass
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import eval_mode, run_as_tensors, working_shape
from mmgcp.nn.hooks import hooked
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.scores.base import Criterion, Progress, as_row
from mmgcp.pruning.scores.channel_gates import scoring_batches
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .modules import InsertedAttention, find_attention, inserted, is_aside
from .scale_folding import fold_scales


@TASK_UTILS.register_module()
class CPSCA(Criterion):
    """The mean scales that attention gave the channels in training (`CPSCA
    <https://arxiv.org/abs/2011.03891>`_).

    The detector has to be a :class:`mmgcp.models.SCADetector` with the weights of its training.
    The score of a layer's channel is the mean, over the images, of the scale in (0, 1) by
    which the channel part of its attention multiplies it; if the layer runs several times on
    an image, as in a head that the levels share, over all runs.

    :func:`mmgcp.pruning.prune` takes the attention out of the detector, which then computes
    something else than it was trained to. ``fold_scales`` keeps it near: what the attention
    multiplies a channel with on average, places included, is multiplied into the layers that
    read it (see :func:`mmgcp.attention.scale_folding.fold_scales`), before anything is pruned.
    How the scales differ from image to image and from place to place is lost in any case, and
    fine-tuning has to make up for it.

    Args:
        fold_scales (bool): Whether to fold. Defaults to True.
    """
    needs = 'images'

    def __init__(self, fold_scales: bool = True):
        self.fold_scales = fold_scales
        self._scales: Dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Measure the scales, and fold them if the attention has been set aside.

        Args:
            model (nn.Module): The detector. With folding, the layers that read scaled
                channels have other parameters afterwards; ``prune`` takes this back if the
                model is not pruned.
            units (Sequence[ChannelUnit]): All units that will be scored.
            batches (Iterable[Batch]): Training batches. They are gone through once.
            progress (Callable): Called with a stage, the steps done in it, and all its steps.

        Raises:
            PruningError: The detector has no attention, or there are no images.
        """
        attention = find_attention(model)
        if attention is None:
            raise PruningError('the criterion CPSCA needs a detector that was trained with '
                               'attention, but this one has none: see mmgcp.SCADetector')
        with inserted(model):
            measured, shape = _measure(model, attention, batches, progress)
        layers: Dict[str, _Sums] = {}
        for block, sums in measured.items():
            layer = attention.producers[block]
            layers[layer] = layers[layer] + sums if layer in layers else sums
        self._scales = {layer: sums.scales / sums.count for layer, sums in layers.items()}
        if self.fold_scales and is_aside(model):
            fold_scales(model, units, attention.producers,
                        {block: sums.scaled for block, sums in measured.items()},
                        {block: sums.energies for block, sums in measured.items()},
                        working_shape(model, shape))

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Score the channels of a channel unit.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.

        Returns:
            dict[str, Tensor]: The scores (C, ) in (0, 1) of each layer with attention, NaN for
            channels that it does not have.
        """
        return {item.module: as_row(unit, item, self._scales[item.module])
                for item in unit.side('out') if item.module in self._scales}


@dataclass
class _Sums:
    """What is added up of an attention with C channels, in double precision on the CPU.

    Attributes:
        count (int): Number of images, in all runs.
        scales (Tensor): Sums (C, ) of the scales of the channels over these.
        scaled (Tensor): Sums (C, ) over images and places of the value before the attention
            times the value behind it.
        energies (Tensor): Sums (C, ) of the squared value before it.
    """
    count: int
    scales: Tensor
    scaled: Tensor
    energies: Tensor

    def __add__(self, other: '_Sums') -> '_Sums':
        return _Sums(self.count + other.count, self.scales + other.scales,
                     self.scaled + other.scaled, self.energies + other.energies)


@torch.no_grad()
def _measure(model: nn.Module, attention: InsertedAttention, batches: Iterable[Batch],
             progress: Progress):
    """Run the model with its attention on all images.

    Returns:
        tuple: The sums by block, of the blocks that ran, and the shape (C, H, W) of the images.
    """
    measured: Dict[str, _Sums] = {}
    scales: Dict[str, Tensor] = {}

    def keep_scales(block):
        def hook(gate, args, output):
            scales[block] = output.double()
        return hook

    def add(block):
        def hook(module, args, output):
            before = args[0].double()
            sums = _Sums(len(before), scales.pop(block).sum(0).cpu(),
                         (before * output.double()).sum((0, 2, 3)).cpu(),
                         before.square().sum((0, 2, 3)).cpu())
            measured[block] = measured[block] + sums if block in measured else sums
        return hook

    handles = []
    for block in attention.producers:
        module = attention.of_block(block)
        handles.append(module.channel.register_forward_hook(keep_scales(block)))
        handles.append(module.register_forward_hook(add(block)))
    like, shape = next(model.parameters()), None
    with hooked(handles), eval_mode(model):
        for batch in scoring_batches(batches, progress):
            run_as_tensors(model, batch.images.to(like))
            shape = batch.images.shape[1:]
    return measured, shape

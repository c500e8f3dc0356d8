# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Scores from the attention that a detector was trained with."""
from dataclasses import dataclass
from typing import Dict, Iterable, Optional, Sequence, Tuple

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

from .inserted import InsertedAttention, attention_in_place, find_attention
from .scale_folding import fold_scales


@TASK_UTILS.register_module()
class CPSCA(Criterion):
    """The mean channel scale of the attention that a detector was trained with (`CPSCA
    <https://arxiv.org/abs/2011.03891>`_).

    The detector has to be built by :class:`mmgcp.attention.SCADetector` and trained. The score
    of a layer's channel is the scale in (0, 1) by which the channel part of its attention
    multiplies it, averaged over the images and, for a layer that runs several times on each
    image (a head shared by the levels), over all runs.

    Attention is taken out of a detector before it is pruned, see
    :func:`mmgcp.attention.attention_aside`. Without it, the detector no longer computes what it
    was trained for. ``fold_scales`` limits the damage: before anything is pruned, the factor by
    which the attention multiplies a channel on average, spatial part included, is folded into
    the layers that read the channel (see :func:`mmgcp.attention.scale_folding.fold_scales`).
    How the scales vary between images and positions is lost in any case, and is left to
    fine-tuning.

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
            model (nn.Module): The detector. Folding gives new parameters to the layers that
                read scaled channels; :func:`mmgcp.attention.attention_aside` takes this back if
                the model is not pruned.
            units (Sequence[ChannelUnit]): All units that will be scored.
            batches (Iterable[Batch]): Training batches. They are read once.
            progress (Callable): Called with a stage, the steps done in it, and all its steps.

        Raises:
            PruningError: The detector has no attention, or there are no images.
        """
        attention = find_attention(model)
        if attention is None:
            raise PruningError('the criterion CPSCA needs a detector that was trained with '
                               'attention, but this one has none: see mmgcp.SCADetector')
        with attention_in_place(model):
            measured, shape = _measure(model, attention, batches, progress)
        layers: Dict[str, _Sums] = {}
        for block, sums in measured.items():
            layer = attention.producers[block]
            layers[layer] = layers[layer] + sums if layer in layers else sums
        self._scales = {layer: sums.scales / sums.count for layer, sums in layers.items()}
        if self.fold_scales and not attention.is_in(model):
            fold_scales(model, units, attention.producers,
                        {block: sums.products for block, sums in measured.items()},
                        {block: sums.energies for block, sums in measured.items()},
                        working_shape(model, shape))

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Score the channels of a channel unit.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.

        Returns:
            dict[str, Tensor]: The scores (C, ) in (0, 1) of each layer with attention, NaN for
            channels that the layer does not have.
        """
        return {item.module: as_row(unit, item, self._scales[item.module])
                for item in unit.side('out') if item.module in self._scales}


@dataclass
class _Sums:
    """Sums over the images and runs of an attention module with C channels.

    The tensors are in double precision on the CPU; x is the input and y the output.

    Attributes:
        count (int): Number of images, each counted once a run.
        scales (Tensor): Sums (C, ) of the channel scales.
        products (Tensor): Sums (C, ) of x * y, also over the positions.
        energies (Tensor): Sums (C, ) of x * x, also over the positions.
    """
    count: int
    scales: Tensor
    products: Tensor
    energies: Tensor

    def __add__(self, other: '_Sums') -> '_Sums':
        return _Sums(self.count + other.count, self.scales + other.scales,
                     self.products + other.products, self.energies + other.energies)


@torch.no_grad()
def _measure(model: nn.Module, attention: InsertedAttention, batches: Iterable[Batch],
             progress: Progress) -> Tuple[Dict[str, _Sums], Sequence[int]]:
    """Run the model with its attention on all images.

    Returns:
        tuple: The sums of each block that ran, and the shape (C, H, W) of the images.
    """
    measured: Dict[str, _Sums] = {}
    scales: Dict[str, Tensor] = {}

    def keep_scales(block):
        def hook(gate, args, output):
            scales[block] = output.double()
        return hook

    def add_run(block):
        def hook(module, args, output):
            x = args[0].double()
            sums = _Sums(len(x), scales.pop(block).sum(0).cpu(),
                         (x * output.double()).sum((0, 2, 3)).cpu(),
                         x.square().sum((0, 2, 3)).cpu())
            measured[block] = measured[block] + sums if block in measured else sums
        return hook

    handles = []
    for block in attention.producers:
        module = attention.of_block(block)
        handles.append(module.channel.register_forward_hook(keep_scales(block)))
        handles.append(module.register_forward_hook(add_run(block)))
    parameter, shape = next(model.parameters()), None
    with hooked(handles), eval_mode(model):
        for batch in scoring_batches(batches, progress):
            run_as_tensors(model, batch.images.to(parameter))
            shape = batch.images.shape[1:]
    return measured, shape

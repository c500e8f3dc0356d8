# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Scores from the attention that a detector was trained with."""
from functools import partial
from typing import Dict, Iterable, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import gather_over_ranks, sum_by_name
from mmgcp.nn.forward import run_as_tensors, working_shape
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.temporarily import eval_mode
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.scores.base import Criterion, Progress, unit_scores
from mmgcp.pruning.scores.channel_gates import scoring_batches
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import BOOLEAN, checked

from .inserted import InsertedAttention, attention_in_place, block_key, find_attention
from .scale_folding import fold_scales


@TASK_UTILS.register_module()
class CPSCA(Criterion):
    """The mean channel scale of the attention that a detector was trained with.

    From `CPSCA <https://arxiv.org/abs/2011.03891>`_. The detector has to be built by
    :class:`mmgcp.attention.SCADetector` and trained. The score of a layer's channel is the
    scale in (0, 1) by which the channel part of its attention multiplies it, averaged over the
    images and, for a layer that runs several times on each image (a head shared by the levels),
    over all runs.

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
    not_in_steps = 'the attention that it looks at is gone after the first one'
    not_without_blocks = 'the attention that it looks at has been trained with all blocks'

    @checked(PruningError, fold_scales=BOOLEAN)
    def __init__(self, fold_scales: bool = True):
        self.fold_scales = fold_scales
        self._scales: Dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Measure the scales, and fold them if the attention has been set aside.

        Folding gives new parameters to the layers that read scaled channels;
        :func:`mmgcp.attention.attention_aside` takes this back if the model is not pruned. The
        batches are read once.

        Raises:
            PruningError: The detector has no attention, or there are no images.
        """
        attention = find_attention(model)
        if attention is None:
            raise PruningError('the criterion CPSCA needs a detector that was trained with '
                               'attention, but this one has none: see mmgcp.SCADetector')
        with attention_in_place(model):
            measured, shape = _measure(model, attention, batches, progress)
        layers: Dict[str, Tensor] = {}
        for block, sums in measured.items():
            layer = attention.producers[block]
            layers[layer] = layers.get(layer, 0) + sums
        self._scales = {layer: scales / count for layer, (count, scales, _, _) in layers.items()}
        if self.fold_scales and not attention.is_in(model):
            fold_scales(model, units, attention.producers,
                        {block: products for block, (_, _, products, _) in measured.items()},
                        {block: energies for block, (_, _, _, energies) in measured.items()},
                        working_shape(model, shape))

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) in (0, 1) by name of the layer, NaN for channels that it lacks."""
        return {item.module: unit_scores(unit, item, self._scales[item.module])
                for item in unit.side('out') if item.module in self._scales}


@torch.no_grad()
def _measure(model: nn.Module, attention: InsertedAttention, batches: Iterable[Batch],
             progress: Progress) -> Tuple[Dict[str, Tensor], Sequence[int]]:
    """Run the model with its attention on all images.

    Returns sums (4, C) over the images of all ranks and runs of each block that ran, and the shape
    (C, H, W) of the images. With the inputs x and outputs y of the attention, they are the sums of
    1, of the channel scales, and, over the positions as well, of x * y and x * x, in double
    precision.
    """
    measured: Dict[str, Tensor] = {}
    scales: Dict[str, Tensor] = {}

    def keep_scales(block: str, _: Tensor, output: Tensor) -> None:
        scales[block] = output.double()

    def add_run(block: str, inputs: Tensor, output: Tensor) -> None:
        x, channel_scales = inputs.double(), scales.pop(block)
        sums = torch.stack((torch.ones_like(channel_scales).sum(0), channel_scales.sum(0),
                            (x * output.double()).sum((0, 2, 3)), x.square().sum((0, 2, 3))))
        measured[block] = measured.get(block, 0) + sums.cpu()

    keys = {block: block_key(block) for block in attention.producers}
    parameter, shape = next(model.parameters()), None
    with on_outputs(attention, {f'{key}.channel': partial(keep_scales, block)
                                for block, key in keys.items()}), \
            on_outputs(attention, {key: partial(add_run, block) for block, key in keys.items()}), \
            eval_mode(model):
        for batch in scoring_batches(batches, progress):
            run_as_tensors(model, batch.images.to(parameter))
            shape = batch.images.shape[1:]
    shapes = [found for found in gather_over_ranks(shape) if found is not None]
    return sum_by_name(measured), shapes[0]

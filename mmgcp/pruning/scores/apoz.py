# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import sum_by_name
from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.temporarily import eval_mode
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import NOT_NEGATIVE, checked, one_of

from .base import Criterion, Progress
from .channel_gates import Reads, on_unit_inputs, scoring_batches

ZEROS = ('nonpositive', 'magnitude')


@TASK_UTILS.register_module()
class APoZ(Criterion):
    """The share of a channel's values that are not zero.

    This is one minus the average percentage of zeros in equation 1 of `Network Trimming
    <https://arxiv.org/abs/1607.03250>`_. The values are those that the consumers of the channel
    read: behind activations, shortcuts, pooling and concatenations, over all images, spatial
    positions, consumers and runs of these. Scores are in [0, 1] in all layers.

    Args:
        zero (str): What counts as zero: ``'nonpositive'`` for values up to ``zero_thr``, which
            is the paper's definition for ReLU, and for activations that are hardly ever zero
            (SiLU, Mish, LeakyReLU) means the values that they attenuate; or ``'magnitude'``
            for absolute values up to ``zero_thr``. Defaults to 'nonpositive'.
        zero_thr (float): Defaults to 0.

    Raises:
        PruningError: ``zero`` is unknown, or ``zero_thr`` negative.
    """
    needs = 'images'
    default_allocation = 'uniform'

    @checked(PruningError, zero=one_of(*ZEROS), zero_thr=NOT_NEGATIVE)
    def __init__(self, zero: str = 'nonpositive', zero_thr: float = 0.):
        self.zero = zero
        self.zero_thr = zero_thr
        self._scores: Dict[str, Tensor] = {}

    @torch.no_grad()
    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Count the values that are not zero while the model runs in eval mode; see the base."""
        counts = {unit.name: torch.zeros(2, unit.size, dtype=torch.double)
                  for unit in units}  # of values that are not zero, and of all

        def count(reads: Reads, dim: int, inputs: Tensor) -> None:
            values = inputs.transpose(0, dim).flatten(1)
            values = values if self.zero == 'nonpositive' else values.abs()
            alive = (values > self.zero_thr).sum(1).double().cpu()
            both = torch.stack((alive, torch.full_like(alive, values.shape[1])))
            for unit, item in reads:
                counts[unit.name].index_add_(1, item.unit_index, both[:, item.channels])

        with eval_mode(model), on_unit_inputs(model, units, count):
            for batch in scoring_batches(batches, progress):
                run_as_tensors(model, batch.images)
        self._scores = {name: alive / number
                        for name, (alive, number) in sum_by_name(counts).items()}

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return shares (C, ) by the name of a unit, NaN for channels that nothing reads."""
        scores = self._scores[unit.name]
        return {} if bool(scores.isnan().all()) else {unit.name: scores}

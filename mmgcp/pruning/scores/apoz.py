# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, Iterable, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import eval_mode, run_as_tensors
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, Progress
from .channel_gates import hooked_readers, scoring_batches

ZEROS = ('nonpositive', 'magnitude')


@TASK_UTILS.register_module()
class APoZ(Criterion):
    """The share of a channel's values that are not zero (`Network Trimming
    <https://arxiv.org/abs/1607.03250>`_): one minus the average percentage of zeros of its
    equation 1.

    The values are those that the layers read which have the channel as an input, over all
    images, positions, layers and runs of these, so behind activations, sums over shortcuts,
    pooling and concatenations. Scores are shares in [0, 1] in all layers.

    Args:
        zero (str): What counts as zero: ``'nonpositive'`` for values up to ``zero_thr``,
            which for ReLU is the paper's definition, and for activations that are never
            exactly zero (SiLU, Mish, LeakyReLU) counts what these attenuate; or
            ``'magnitude'`` for absolute values up to ``zero_thr``. Defaults to 'nonpositive'.
        zero_thr (float): Defaults to 0.

    Raises:
        PruningError: ``zero`` is unknown, or ``zero_thr`` negative.
    """
    needs = 'images'

    def __init__(self, zero: str = 'nonpositive', zero_thr: float = 0.):
        if zero not in ZEROS:
            raise PruningError(f'zero must be one of {ZEROS}, but is {zero!r}')
        if zero_thr < 0:
            raise PruningError(f'zero_thr must not be negative, but is {zero_thr}')
        self.zero = zero
        self.zero_thr = zero_thr
        self._scores: Dict[str, Tensor] = {}

    @torch.no_grad()
    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Count values that are not zero while the model runs in eval mode; see the base."""
        counts = {unit.name: torch.zeros(2, unit.size, dtype=torch.double)
                  for unit in units}  # values other than zero, and all

        def make_hook(dim, reads):
            def hook(_, args):
                alive = self._alive(args[0].transpose(0, dim).flatten(1)).sum(1).double().cpu()
                number = args[0].numel() / max(1, len(alive))
                for unit, item in reads:
                    counts[unit.name][0].index_add_(0, item.unit_index, alive[item.channels])
                    counts[unit.name][1].index_add_(
                        0, item.unit_index, torch.full_like(alive, number)[item.channels])
            return hook

        with eval_mode(model), hooked_readers(model, units, make_hook):
            for batch in scoring_batches(batches, progress):
                run_as_tensors(model, batch.images)
        self._scores = {name: alive / number for name, (alive, number) in counts.items()}

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return the shares (C, ) by the name of a unit of size C, NaN for channels unread."""
        row = self._scores[unit.name]
        return {} if bool(row.isnan().all()) else {unit.name: row}

    def _alive(self, values: Tensor) -> Tensor:
        return (values if self.zero == 'nonpositive' else values.abs()) > self.zero_thr

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, Iterable, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion, Progress
from .channel_gates import relative_roots, squared_gradients


@TASK_UTILS.register_module()
class Taylor(Criterion):
    """The change of the loss without a channel, to first order (`Importance Estimation for
    Neural Network Pruning <https://arxiv.org/abs/1906.10771>`_, its importance
    (dE/dz)^2 = (sum_s g_s w_s)^2 of a gate z).

    With a gate z = 1 that multiplies a channel wherever it is read, the loss changes by
    -dL/dz for z = 0, to first order: the sum of activation times gradient over all
    positions and all layers of the channel unit that read it. Its importance is the mean of
    (dL/dz)^2 over the images. The score is the root of that in relation to the mean of all
    channels of the model, so that scores of all units can be compared, 1 is an average
    channel, and the squared score, by which the planner spends a budget, is in proportion
    to the importance.

    L is the sum of the detector's losses for a batch as it is, and dL/dz the share of each
    image in it. If that loss is a mean over the images, as in MMDetection, images of
    a smaller last batch count more; a common factor has no influence. Behind the pooling
    of regions in two-stage detectors dL/dz is that of the whole batch.

    What the images do not need scores nothing: if a level of the detector has no object to
    find in them, the layers that regress its boxes go first. So take enough images.
    """
    needs = 'losses'

    def __init__(self):
        self._scores: Dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Go through the batches once, forwards and backwards; see the base."""
        sums, images = squared_gradients(model, units, batches, progress)
        self._scores = relative_roots({name: values / images for name, values in sums.items()})

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return the scores (C, ) by the name of a unit of size C; none if no loss sees it."""
        return {name: row for name, row in self._scores.items() if name == unit.name}

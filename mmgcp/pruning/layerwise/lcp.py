# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Sequence

import torch.nn as nn

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.auxiliary.positives import PriorBoxes
from mmgcp.registry import TASK_UTILS

from .auxiliary import AuxiliaryCriterion, LocalizationNetwork, Positives, find_positives


@TASK_UTILS.register_module()
class LCP(AuxiliaryCriterion):
    """Localization-aware channel pruning (`arXiv 1911.02237
    <https://arxiv.org/abs/1911.02237>`_).

    The auxiliary networks say what objects are and where, from the features around a default
    box that matches them and the object. See
    :class:`mmgcp.pruning.layerwise.auxiliary.AuxiliaryCriterion` for how channels are chosen and
    weights are adapted.

    A default box is an anchor of the head. Heads that have points instead get square boxes
    around these. It matches the object that it overlaps most, if the IoU is high enough; an
    object that none matches gets the one that overlaps it most.

    Args:
        box_weight (float): Weight m of the loss of the boxes, 1 - GIoU, beside the
            cross-entropy. Defaults to 50.
        roi_size (int): Cells that RoIAlign divides a region into, in either direction.
            Defaults to 7.
        width (int): Number of channels inside of an auxiliary network. Defaults to 32.
        iou_threshold (float): The least IoU of a match. Defaults to 0.5.
        max_positives (int): At most so many matches of an image are used, evenly spread.
            Defaults to 64.
        point_scales (Sequence[float]): Sides of the boxes around points, as multiples of
            the stride. Defaults to (2, 4, 8).
        **kwargs: See :class:`mmgcp.pruning.layerwise.auxiliary.AuxiliaryCriterion`.
    """

    def __init__(self, box_weight: float = 50., roi_size: int = 7, width: int = 32,
                 iou_threshold: float = 0.5, max_positives: int = 64,
                 point_scales: Sequence[float] = (2, 4, 8), **kwargs):
        super().__init__(**kwargs)
        self.box_weight = box_weight
        self.roi_size = roi_size
        self.width = width
        self.iou_threshold = iou_threshold
        self.max_positives = max_positives
        self._priors = PriorBoxes(point_scales)

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        return LocalizationNetwork(
            channels, num_classes, self.roi_size, self.width, self.box_weight)

    def find_targets(self, model: nn.Module, batch: Batch) -> Positives:
        return find_positives(self._priors(model, batch.images), batch, self.iou_threshold,
                              self.max_positives)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Sequence

import torch.nn as nn

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.auxiliary import (
    AuxiliaryCriterion,
    LocalizationNetwork,
    Positives,
    PriorBoxes,
    find_positives,
)
from mmgcp.registry import TASK_UTILS


@TASK_UTILS.register_module()
class LCP(AuxiliaryCriterion):
    """Localization-aware channel pruning (`arXiv 1911.02237
    <https://arxiv.org/abs/1911.02237>`_).

    The auxiliary networks predict classes and boxes of objects from the features around prior
    boxes that match them. See :class:`AuxiliaryCriterion` for how channels are chosen and kernels
    are fitted.

    Prior boxes are the anchors of the head; heads with points have squares around the points
    instead. A prior box matches the object that it overlaps most, if the IoU is high enough; an
    object that is matched by none is matched by the one that overlaps it most.

    Args:
        box_weight (float): Weight m of the box loss, 1 - GIoU, relative to the cross-entropy.
            Defaults to 50.
        roi_size (int): Cells of a region along each axis. Defaults to 7.
        width (int): Number of hidden channels of an auxiliary network. Defaults to 32.
        iou_threshold (float): The least IoU of a match. Defaults to 0.5.
        max_positives (int): Largest number of matches in an image; more are thinned out evenly.
            Defaults to 64.
        point_scales (Sequence[float]): Sides of the squares around points, as multiples of
            the stride. Defaults to (2, 4, 8).
        **kwargs: See :class:`AuxiliaryCriterion`.
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
        """Find the prior boxes of the detector that match objects of the batch."""
        return find_positives(self._priors(model, batch.images), batch, self.iou_threshold,
                              self.max_positives)

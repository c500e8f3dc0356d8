# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""LCP: keep the channels that tell the most about classes and boxes of objects."""
from typing import Any, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import roi_align
from mmdet.models.losses.iou_loss import giou_loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.auxiliary import AuxiliaryCriterion
from mmgcp.pruning.layerwise.auxiliary.targets import Positives, PriorBoxes, find_positives
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import COUNT, LOSS_WEIGHT, POSITIVE, SHARE, checked, list_of, number_in

# Interpolated values per cell, along each axis. RoIAlign's default, as many as there are pixels,
# would take most of the time of LCP on a CPU.
SAMPLES = 2


def enclosing_boxes(first: Tensor, second: Tensor) -> Tensor:
    """Return the smallest boxes (K, 4) that contain both of K pairs of boxes (x1, y1, x2, y2)."""
    return torch.cat((torch.minimum(first[:, :2], second[:, :2]),
                      torch.maximum(first[:, 2:], second[:, 2:])), 1)


def contextual_roi_align(feature: Tensor, positives: Positives, size: int = 7) -> Tensor:
    """Crop prior boxes together with their objects from a feature map (N, C, H, W).

    The contextual RoIAlign of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_):
    RoIAlign of the smallest box around both, as a prior box of a shallow layer alone may miss
    most of the object. How many pixels a cell of the feature map covers follows, for each axis,
    from the sizes of the images and of the map. Return (K, C, size, size), each value the mean of
    two by two interpolated ones.
    """
    boxes = enclosing_boxes(positives.priors, positives.boxes)
    (rows, columns), (height, width) = feature.shape[-2:], positives.image_size
    scale = boxes.new_tensor([columns / width, rows / height]).repeat(2)
    rois = torch.cat((positives.images[:, None].to(boxes), boxes * scale), 1)
    # MMCV reads the memory of maps as if they were contiguous
    return roi_align(feature.contiguous(), rois.to(feature), (size, size), 1., SAMPLES, 'avg', True)


class LocalizationNetwork(nn.Module):
    """Predicts classes and boxes of objects from the features around prior boxes.

    The auxiliary network of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_):
    contextual RoIAlign, followed by a classifier and a box regressor. To keep these small, a
    normalisation and a 1x1 convolution come before them, which the paper does not have.
    """

    def __init__(self, channels: int, num_classes: int, roi_size: int = 7, width: int = 32,
                 box_weight: float = 50.):
        super().__init__()
        self.roi_size = roi_size
        self.box_weight = box_weight
        # momentum=None: averages over all of the training, which is short
        self.bn = nn.BatchNorm2d(channels, momentum=None)
        self.conv = nn.Conv2d(channels, width, 1)
        self.classifier = nn.Linear(width * roi_size**2, num_classes)
        self.regressor = nn.Linear(width * roi_size**2, 4)
        self.coder = DeltaXYWHBBoxCoder(target_stds=(0.1, 0.1, 0.2, 0.2))  # of SSD

    def forward(self, feature: Tensor, positives: Positives) -> Tuple[Tensor, Tensor]:
        """Return class scores (K, num_classes) and decoded boxes (K, 4) in pixels."""
        regions = contextual_roi_align(feature, positives, self.roi_size)
        hidden = F.relu(self.conv(self.bn(regions))).flatten(1)
        boxes = self.coder.decode(positives.priors.to(hidden), self.regressor(hidden))
        return self.classifier(hidden), boxes

    def loss(self, feature: Tensor, positives: Positives) -> Tensor:
        """Return the mean of cross-entropy + m * (1 - GIoU), zero without positives."""
        if not len(positives):
            return feature.sum() * 0
        scores, boxes = self(feature, positives)
        return (F.cross_entropy(scores, positives.labels)
                + self.box_weight * giou_loss(boxes, positives.boxes.to(boxes)))


@TASK_UTILS.register_module()
class LCP(AuxiliaryCriterion):
    """Localization-aware channel pruning.

    `arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_. The auxiliary networks predict classes
    and boxes of objects from the features around prior boxes that match them. See
    :class:`AuxiliaryCriterion` for how channels are chosen and kernels are fitted.

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

    @checked(PruningError, box_weight=LOSS_WEIGHT, roi_size=number_in(1, 64, integer=True),
             width=number_in(1, 4096, integer=True), iou_threshold=SHARE, max_positives=COUNT,
             point_scales=list_of(POSITIVE, 'must be a list of positive numbers'))
    def __init__(self, box_weight: float = 50., roi_size: int = 7, width: int = 32,
                 iou_threshold: float = 0.5, max_positives: int = 64,
                 point_scales: Sequence[float] = (2, 4, 8), **kwargs: Any):
        super().__init__(**kwargs)
        self._network_options = dict(roi_size=roi_size, width=width, box_weight=box_weight)
        self._limits = dict(threshold=iou_threshold, max_positives=max_positives)
        self._priors = PriorBoxes(point_scales)

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        """Make a network that predicts classes and boxes of objects."""
        return LocalizationNetwork(channels, num_classes, **self._network_options)

    def find_targets(self, model: nn.Module, batch: Batch) -> Positives:
        """Find the prior boxes of the detector that match objects of the batch."""
        return find_positives(self._priors(model, batch.images), batch, **self._limits)

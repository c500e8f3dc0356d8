# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Small networks that measure how much a feature map still tells about the objects."""
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import roi_align
from mmdet.models.losses.iou_loss import giou_loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor

from .positives import Positives

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


class PresenceNetwork(nn.Module):
    """Predicts which classes are in an image: BatchNorm, ReLU, average pooling, classifier.

    The auxiliary classifier of DCP (`arXiv 1810.11809, section 3.2
    <https://arxiv.org/abs/1810.11809>`_). As the images of a detector do not have a single class,
    the loss is not cross-entropy but the binary cross-entropy of each class.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, momentum=None)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Return class scores (N, num_classes) of a feature map (N, C, H, W)."""
        return self.classifier(F.relu(self.bn(feature)).mean((2, 3)))

    def loss(self, feature: Tensor, presence: Tensor) -> Tensor:
        """Return the mean binary cross-entropy over images and classes.

        ``presence`` is 1 for each class (N, num_classes) that is in the image, else 0.
        """
        return F.binary_cross_entropy_with_logits(self(feature), presence.to(feature))

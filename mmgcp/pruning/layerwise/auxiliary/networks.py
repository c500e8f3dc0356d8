# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Small networks that measure how much a feature map still tells about the objects."""
from typing import Tuple

import torch.nn as nn
import torch.nn.functional as F
from mmdet.models.losses.iou_loss import giou_loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor

from .contextual_roi import contextual_roi_align
from .positives import Positives


class LocalizationNetwork(nn.Module):
    """Predicts classes and boxes of objects from the features around prior boxes.

    The auxiliary network of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_):
    contextual RoIAlign, followed by a classifier and a box regressor. To keep these small, a
    normalisation and a 1x1 convolution come before them, which the paper does not have.

    Args:
        channels (int): Number of channels of the feature map.
        num_classes (int): Number of classes.
        roi_size (int): Cells of a region along each axis. Defaults to 7.
        width (int): Number of channels that classifier and regressor read. Defaults to 32.
        box_weight (float): Weight m of the box loss. Defaults to 50.
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
        """Return class scores (K, num_classes) and decoded boxes (K, 4) in pixels.

        Args:
            feature (Tensor): Feature map (N, C, H, W).
            positives (Positives): K prior boxes and their objects.
        """
        regions = contextual_roi_align(feature, positives, self.roi_size)
        hidden = F.relu(self.conv(self.bn(regions))).flatten(1)
        boxes = self.coder.decode(positives.priors.to(hidden), self.regressor(hidden))
        return self.classifier(hidden), boxes

    def loss(self, feature: Tensor, positives: Positives) -> Tensor:
        """Compute the auxiliary loss of LCP.

        Args:
            feature (Tensor): Feature map (N, C, H, W).
            positives (Positives): K prior boxes and their objects.

        Returns:
            Tensor: The mean of cross-entropy + m * (1 - GIoU); zero without positives.
        """
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

    Args:
        channels (int): Number of channels of the feature map.
        num_classes (int): Number of classes.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, momentum=None)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Return class scores (N, num_classes) of a feature map (N, C, H, W)."""
        return self.classifier(F.relu(self.bn(feature)).mean((2, 3)))

    def loss(self, feature: Tensor, presence: Tensor) -> Tensor:
        """Compute the discrimination loss.

        Args:
            feature (Tensor): Feature map (N, C, H, W).
            presence (Tensor): 1 for each class (N, num_classes) that is in the image, else 0.

        Returns:
            Tensor: The mean binary cross-entropy over images and classes.
        """
        return F.binary_cross_entropy_with_logits(self(feature), presence.to(feature))

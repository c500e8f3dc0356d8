# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Small networks that tell how much a feature map still says about the objects."""
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F
from mmdet.models.losses.iou_loss import giou_loss
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor

from .contextual_roi import contextual_roi_align
from .positives import Positives
from .recording import Outputs


class LocalizationNetwork(nn.Module):
    """Says of objects what they are and where, from the features around a prior box.

    The auxiliary network of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_):
    contextual RoIAlign, then a classifier and a regressor of boxes. Here a normalisation and
    a 1x1 convolution are before them, to keep it small.

    Args:
        channels (int): Number of channels of the feature map.
        num_classes (int): Number of classes.
        roi_size (int): Cells that a region is divided into. Defaults to 7.
        width (int): Number of channels that the classifier reads. Defaults to 32.
        box_weight (float): Weight m of the loss of the boxes. Defaults to 50.
    """

    def __init__(self, channels: int, num_classes: int, roi_size: int = 7, width: int = 32,
                 box_weight: float = 50.):
        super().__init__()
        self.roi_size = roi_size
        self.box_weight = box_weight
        # averages over all of training, which is short
        self.bn = nn.BatchNorm2d(channels, momentum=None)
        self.conv = nn.Conv2d(channels, width, 1)
        self.classifier = nn.Linear(width * roi_size**2, num_classes)
        self.regressor = nn.Linear(width * roi_size**2, 4)
        self.coder = DeltaXYWHBBoxCoder(target_stds=(0.1, 0.1, 0.2, 0.2))  # of SSD

    def forward(self, feature: Tensor, positives: Positives):
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
            Tensor: The mean of cross-entropy + m * (1 - GIoU), zero without positives.
        """
        if not len(positives):
            return feature.sum() * 0
        scores, boxes = self(feature, positives)
        return (F.cross_entropy(scores, positives.labels)
                + self.box_weight * giou_loss(boxes, positives.boxes.to(boxes)))


class PresenceNetwork(nn.Module):
    """Says which classes there are in an image: normalisation, ReLU, average, classifier.

    The auxiliary classifier of DCP (`arXiv 1810.11809, section 3.2
    <https://arxiv.org/abs/1810.11809>`_). As an image of a detector has no single class, the
    loss is not the cross-entropy of one but the binary cross-entropy of each.

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
            Tensor: The mean binary cross-entropy of images and classes.
        """
        return F.binary_cross_entropy_with_logits(self(feature), presence.to(feature))


@dataclass
class Auxiliary:
    """An auxiliary network and where it sits.

    Attributes:
        layer (str): Name of the layer whose output it reads.
        call (int): Which of the layer's outputs, counted from 0.
        channels (int): Number of channels of that.
        network (nn.Module): The network.
    """
    layer: str
    call: int
    channels: int
    network: nn.Module

    def loss(self, outputs: Outputs, targets) -> Tensor:
        """Compute the network's loss on recorded outputs."""
        return self.network.loss(outputs[self.layer][self.call], targets)

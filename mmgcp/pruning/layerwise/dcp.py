# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""DCP: keep the channels that tell the most about the classes in an image."""
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.auxiliary import AuxiliaryCriterion
from mmgcp.pruning.layerwise.auxiliary.targets import classes_of, read_ground_truth
from mmgcp.registry import TASK_UTILS


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
        """Return the mean binary cross-entropy with the presence, 0 or 1, (N, num_classes)."""
        return F.binary_cross_entropy_with_logits(self(feature), presence.to(feature))


@TASK_UTILS.register_module()
class DCP(AuxiliaryCriterion):
    """Discrimination-aware channel pruning.

    `arXiv 1810.11809 <https://arxiv.org/abs/1810.11809>`_. The auxiliary networks predict which
    classes are in an image. See :class:`AuxiliaryCriterion` for how channels are chosen and
    kernels are fitted.

    Deviations from the paper: DCP is made for images of a single class. As those of a detector
    have any number, the discrimination loss is the binary cross-entropy of each class. Each unit
    has an auxiliary network of its own, not each stage of the detector, and all of them are
    trained once, before the first unit is pruned.

    Args:
        rounds (int): Number of rounds in which channels are chosen. Defaults to 4.
        **kwargs: See :class:`AuxiliaryCriterion`.
    """
    reconstruction_weight = 0.5  # equation 2 of the paper has half the mean squared error

    def __init__(self, rounds: int = 4, **kwargs: Any):
        super().__init__(rounds=rounds, **kwargs)

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        """Make a network that predicts the classes in an image."""
        return PresenceNetwork(channels, num_classes)

    def find_targets(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return 1 for each class (N, num_classes) that is in the image, else 0."""
        presence = batch.images.new_zeros(len(batch.images), classes_of(model))
        for row, truth in zip(presence, read_ground_truth(batch)):
            row[truth.labels] = 1
        return presence

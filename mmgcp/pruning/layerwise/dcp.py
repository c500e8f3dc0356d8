# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.auxiliary import (
    AuxiliaryCriterion,
    PresenceNetwork,
    number_of_classes,
    read_ground_truth,
)
from mmgcp.registry import TASK_UTILS


@TASK_UTILS.register_module()
class DCP(AuxiliaryCriterion):
    """Discrimination-aware channel pruning (`arXiv 1810.11809
    <https://arxiv.org/abs/1810.11809>`_).

    The auxiliary networks predict which classes are in an image. See :class:`AuxiliaryCriterion`
    for how channels are chosen and kernels are fitted.

    Deviations from the paper: DCP is made for images of a single class. As those of a detector
    have any number, the discrimination loss is the binary cross-entropy of each class. Each unit
    has an auxiliary network of its own, not each stage of the detector, and all of them are
    trained once, before the first unit is pruned.

    Args:
        rounds (int): Number of rounds in which channels are chosen. Defaults to 4.
        **kwargs: See :class:`AuxiliaryCriterion`.
    """
    reconstruction_weight = 0.5  # equation 2 of the paper has half the mean squared error

    def __init__(self, rounds: int = 4, **kwargs):
        super().__init__(rounds=rounds, **kwargs)

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        return PresenceNetwork(channels, num_classes)

    def find_targets(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return 1 for each class (N, num_classes) that is in the image, else 0."""
        presence = batch.images.new_zeros(len(batch.images), number_of_classes(model))
        for row, truth in zip(presence, read_ground_truth(batch)):
            row[truth.labels] = 1
        return presence

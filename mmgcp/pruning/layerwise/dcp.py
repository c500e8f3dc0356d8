# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.auxiliary.positives import number_of_classes
from mmgcp.registry import TASK_UTILS

from .auxiliary import AuxiliaryCriterion, PresenceNetwork, read_ground_truth


@TASK_UTILS.register_module()
class DCP(AuxiliaryCriterion):
    """Discrimination-aware channel pruning (`arXiv 1810.11809
    <https://arxiv.org/abs/1810.11809>`_).

    The auxiliary networks are classifiers: BatchNorm, ReLU, average pooling and a linear
    layer. DCP is made for images of one class; those of a detector have any number, so
    the discrimination loss is the binary cross-entropy of whether a class is in the image.
    ``alpha`` is what the paper calls lambda. See
    :class:`mmgcp.pruning.layerwise.auxiliary.AuxiliaryCriterion` for how channels are chosen and
    weights are adapted.

    Unlike in the paper, all classifiers are trained once, before the first layer is pruned,
    and each unit has its own, not each stage of the network.

    Args:
        rounds (int): Number of rounds that channels are chosen in. Defaults to 4.
        **kwargs: See :class:`mmgcp.pruning.layerwise.auxiliary.AuxiliaryCriterion`.
    """
    reconstruction_weight = 0.5  # of the mean squared error in the paper, equation 2

    def __init__(self, rounds: int = 4, **kwargs):
        super().__init__(rounds=rounds, **kwargs)

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        return PresenceNetwork(channels, num_classes)

    def find_targets(self, model: nn.Module, batch: Batch) -> Tensor:
        """Say with ones which classes (N, num_classes) are in the images of a batch."""
        presence = batch.images.new_zeros(len(batch.images), number_of_classes(model))
        for row, truth in zip(presence, read_ground_truth(batch)):
            row[truth.labels] = 1
        return presence

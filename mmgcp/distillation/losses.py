# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Losses between the features of a student and of its teacher."""
import warnings

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.registry import MODELS


def spatial_attention(feature: Tensor) -> Tensor:
    """Spatial attention map, `arXiv 1612.03928 <https://arxiv.org/abs/1612.03928>`_.

    It is the mean of the squares over the channels, flattened and scaled to an L2
    norm of 1 for each image, and always in single precision.

    Args:
        feature (Tensor): (N, C, H, W).

    Returns:
        Tensor: (N, H * W).
    """
    return _normalize(_mean_square(feature))


@MODELS.register_module()
class SpatialAttentionLoss(nn.Module):
    """Mean squared difference of two spatial attention maps, from `GCP-SAD
    <https://arxiv.org/abs/2306.01526>`_.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight
        self._warned_of_size = False

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare two features, whose numbers of channels may differ.

        If their sizes differ, the teacher's map of mean squares is resized to the
        student's before it is normalised.

        Args:
            student_feature (Tensor): (N, C, H, W).
            teacher_feature (Tensor): (N, C', H', W').

        Returns:
            Tensor: A scalar.
        """
        student_map = _mean_square(student_feature)
        teacher_map = _mean_square(teacher_feature)
        if student_map.shape[1:] != teacher_map.shape[1:]:
            teacher_map = self._resize(teacher_map, student_map)
        return self.loss_weight * F.mse_loss(_normalize(student_map), _normalize(teacher_map))

    def _resize(self, teacher_map: Tensor, student_map: Tensor) -> Tensor:
        size = student_map.shape[1:]
        if not self._warned_of_size:
            self._warned_of_size = True
            warnings.warn(f"the teacher's map of size {tuple(teacher_map.shape[1:])} is resized "
                          f"to the student's {tuple(size)} to compare their attention")
        resized = F.interpolate(
            teacher_map[:, None], size=size, mode='bilinear', align_corners=False)
        return resized[:, 0]


def _mean_square(feature: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H, W), in single precision from before the squaring."""
    return feature.float().square().mean(dim=1)


def _normalize(mean_square: Tensor) -> Tensor:
    """(N, H, W) to (N, H * W) with an L2 norm of 1 in each row."""
    return F.normalize(mean_square.flatten(1), dim=1)

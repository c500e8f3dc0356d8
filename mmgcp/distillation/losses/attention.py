# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch.nn.functional as F
from torch import Tensor

from mmgcp.registry import MODELS

from .feature_loss import FeatureLoss


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
class SpatialAttentionLoss(FeatureLoss):
    """Mean squared difference of two spatial attention maps, from `GCP-SAD
    <https://arxiv.org/abs/2306.01526>`_.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'attention'

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
        teacher_map = self.resize(_mean_square(teacher_feature), student_map)
        return self.loss_weight * F.mse_loss(_normalize(student_map), _normalize(teacher_map))


def _mean_square(feature: Tensor) -> Tensor:
    """(N, C, H, W) to (N, 1, H, W), in single precision from before the squaring."""
    return feature.float().square().mean(dim=1, keepdim=True)


def _normalize(mean_square: Tensor) -> Tensor:
    """(N, 1, H, W) to (N, H * W) with an L2 norm of 1 in each row."""
    return F.normalize(mean_square.flatten(1), dim=1)

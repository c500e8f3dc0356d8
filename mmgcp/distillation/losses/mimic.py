# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch.nn.functional as F
from torch import Tensor

from mmgcp.registry import MODELS

from .feature_loss import AdaptedLoss


@MODELS.register_module()
class FeatureMimicLoss(AdaptedLoss):
    """Mean squared difference of two features, as the hints of `FitNets
    <https://arxiv.org/abs/1412.6550>`_ (equation 3, but the mean in place of half the sum).

    The regressor is a 1x1 convolution, and only where the numbers of channels differ.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'mimic'

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare two features.

        Args:
            student_feature (Tensor): (N, C, H, W).
            teacher_feature (Tensor): (N, C', H', W').

        Returns:
            Tensor: A scalar.
        """
        return self.loss_weight * F.mse_loss(*self.align(student_feature, teacher_feature))

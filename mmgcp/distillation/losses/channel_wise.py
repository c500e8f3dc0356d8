# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import MODELS

from .feature_loss import AdaptedLoss


@MODELS.register_module()
class ChannelWiseLoss(AdaptedLoss):
    """`Channel-wise knowledge distillation <https://arxiv.org/abs/2011.13256>`_.

    Each channel becomes a distribution over the positions i by a softmax (equation 4),
    and the student's is drawn to the teacher's by the Kullback-Leibler divergence
    (equation 5)

    .. math::
        \\frac{\\tau^2}{C} \\sum_c \\sum_i \\phi(y^T_{c,i})
        \\log \\frac{\\phi(y^T_{c,i})}{\\phi(y^S_{c,i})}

    averaged over the images. As in the paper a 1x1 convolution adapts the number of
    the student's channels if it differs.

    Args:
        tau (float): Temperature of the softmax. Defaults to 1.0.
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'channel'

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        if not tau > 0:
            raise UserError(f'tau must be positive, but is {tau}')
        self.tau = tau

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare two features.

        Args:
            student_feature (Tensor): (N, C, H, W).
            teacher_feature (Tensor): (N, C', H', W').

        Returns:
            Tensor: A scalar.
        """
        student, teacher = (
            F.log_softmax(feature.flatten(2) / self.tau, dim=2)
            for feature in self.align(student_feature, teacher_feature))
        divergence = F.kl_div(student, teacher, reduction='sum', log_target=True)
        num_channels = student.shape[0] * student.shape[1]
        return self.loss_weight * self.tau**2 * divergence / num_channels

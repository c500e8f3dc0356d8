# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Losses between a feature map of the student and one of the teacher."""
import warnings
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import MODELS
from mmgcp.utils.checks import LOSS_WEIGHT, checked, number_in

# Added to the variance of a channel: what varies less is as good as constant
VARIANCE_EPS = 1e-6


class FeatureLoss(nn.Module):
    """Base of the losses between two feature maps.

    The loss of a group of layers is reported as ``loss_<kind>_<group>``.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'feature'

    @checked(loss_weight=LOSS_WEIGHT)
    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight
        self._warned_of_size = False

    def resize(self, teacher_map: Tensor, student_map: Tensor) -> Tensor:
        """Resize a teacher's map (N, C, H', W') to the student's (N, C', H, W), and warn once."""
        size = student_map.shape[-2:]
        if teacher_map.shape[-2:] == size:
            return teacher_map
        if not self._warned_of_size:
            self._warned_of_size = True
            warnings.warn(f"the teacher's map of size {tuple(teacher_map.shape[-2:])} is resized "
                          f"to the student's {tuple(size)} to compare their {self.kind}",
                          stacklevel=2)
        return F.interpolate(teacher_map, size=size, mode='bilinear', align_corners=False)


def spatial_attention(feature: Tensor) -> Tensor:
    """Compute the spatial attention map of `arXiv 1612.03928 <https://arxiv.org/abs/1612.03928>`_.

    It is the mean of the squares over the channels, flattened and scaled to an L2
    norm of 1 for each image, always in single precision.

    Args:
        feature (Tensor): (N, C, H, W).

    Returns:
        Tensor: (N, H * W).
    """
    return _normalize(_mean_square(feature))


@MODELS.register_module()
class SpatialAttentionLoss(FeatureLoss):
    """Mean squared difference of two spatial attention maps.

    From `GCP-SAD <https://arxiv.org/abs/2306.01526>`_.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'attention'

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare features (N, C, H, W) and (N, C', H', W').

        If their sizes differ, the teacher's map of mean squares is resized to the
        student's before it is normalised.
        """
        student_map = _mean_square(student_feature)
        teacher_map = self.resize(_mean_square(teacher_feature), student_map)
        return self.loss_weight * F.mse_loss(_normalize(student_map), _normalize(teacher_map))


def _mean_square(feature: Tensor) -> Tensor:
    """Turn (N, C, H, W) into (N, 1, H, W), in single precision from before squaring on."""
    return feature.float().square().mean(dim=1, keepdim=True)


def _normalize(mean_square: Tensor) -> Tensor:
    """Turn (N, 1, H, W) into (N, H * W) with an L2 norm of 1 in each row."""
    return F.normalize(mean_square.flatten(1), dim=1)


class AdaptedLoss(FeatureLoss):
    """Base of the losses that compare channel with channel.

    If student and teacher have different numbers of channels, a 1x1 convolution without bias
    maps the student's channels to as many as the teacher has. It is trained with the student.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """

    @checked(loss_weight=LOSS_WEIGHT)
    def __init__(self, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.adapter = None

    def adapt(self, student_channels: int, teacher_channels: int) -> None:
        """Make the adapter if the numbers of channels differ."""
        if student_channels != teacher_channels:
            self.adapter = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)

    def align(self, student_feature: Tensor, teacher_feature: Tensor) -> Tuple[Tensor, Tensor]:
        """Turn features (N, C, H, W) and (N, C', H', W') into comparable ones (N, C', H, W).

        They are in single precision. Numbers of channels that differ without an adapter are a
        UserError.
        """
        if self.adapter is not None:
            student_feature = self.adapter(student_feature)
        channels = student_feature.shape[1], teacher_feature.shape[1]
        if channels[0] != channels[1]:
            raise UserError(f"the student's {channels[0]} channels cannot be compared with the "
                            f"teacher's {channels[1]} without an adapter")
        student_feature, teacher_feature = student_feature.float(), teacher_feature.float()
        return student_feature, self.resize(teacher_feature, student_feature)


@MODELS.register_module()
class FeatureMimicLoss(AdaptedLoss):
    """Mean squared difference of two features.

    These are the hints of `FitNets <https://arxiv.org/abs/1412.6550>`_ (equation 3, but the mean
    instead of half the sum). The regressor is a 1x1 convolution, and is only there if the
    numbers of channels differ.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'mimic'

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare features (N, C, H, W) and (N, C', H', W')."""
        return self.loss_weight * F.mse_loss(*self.align(student_feature, teacher_feature))


@MODELS.register_module()
class ChannelWiseLoss(AdaptedLoss):
    r"""`Channel-wise knowledge distillation <https://arxiv.org/abs/2011.13256>`_.

    A softmax turns each channel into a distribution over the positions i (equation 4). The
    loss is the Kullback-Leibler divergence of the student's from the teacher's (equation 5)

    .. math::
        \frac{\tau^2}{C} \sum_c \sum_i \phi(y^T_{c,i})
        \log \frac{\phi(y^T_{c,i})}{\phi(y^S_{c,i})}

    averaged over the images. As in the paper, a 1x1 convolution adapts the number of
    the student's channels if it differs.

    Args:
        tau (float): Temperature of the softmax. Defaults to 1.0.
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.

    Raises:
        UserError: ``tau`` is not positive.
    """
    kind = 'channel'

    @checked(tau=number_in(0, 1e6, open_low=True), loss_weight=LOSS_WEIGHT)
    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.tau = tau

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare features (N, C, H, W) and (N, C', H', W')."""
        student, teacher = (
            F.log_softmax(feature.flatten(2) / self.tau, dim=2)
            for feature in self.align(student_feature, teacher_feature))
        divergence = F.kl_div(student, teacher, reduction='sum', log_target=True)
        num_channels = student.shape[0] * student.shape[1]
        return self.loss_weight * self.tau**2 * divergence / num_channels


@MODELS.register_module()
class PearsonLoss(AdaptedLoss):
    r"""Distillation by the correlation of channels, `PKD <https://arxiv.org/abs/2207.02039>`_.

    Each channel is standardised to a mean of 0 and a variance of 1 over the images and positions
    of the batch. The loss is half the mean squared difference, which is one minus Pearson's
    coefficient r of the M values of a channel, averaged over the channels:

    .. math::
        \frac{1}{C} \sum_c \frac{1}{2 M} \sum_i (\hat y^S_{c,i} - \hat y^T_{c,i})^2
        = \frac{1}{C} \sum_c (1 - r(y^S_c, y^T_c))

    So only the pattern of a channel counts, not how strong it is, and no channel or scale outweighs
    the others. A channel that is constant in one of the two has no pattern there and costs 1/2. The
    authors compare the outputs of necks, with a weight of 6. A 1x1 convolution adapts the number of
    the student's channels if it differs.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'correlation'

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """Compare features (N, C, H, W) and (N, C', H', W')."""
        student, teacher = map(standardize, self.align(student_feature, teacher_feature))
        return self.loss_weight * F.mse_loss(student, teacher) / 2


def channel_statistics(feature: Tensor) -> Tuple[Tensor, Tensor]:
    """Compute mean and standard deviation (1, C, 1, 1) of the channels of a feature (N, C, H, W).

    They are those over all images and positions, in single precision. The deviation is never 0.
    """
    variance, mean = torch.var_mean(feature.float(), dim=(0, 2, 3), unbiased=False, keepdim=True)
    return mean, (variance + VARIANCE_EPS).sqrt()


def standardize(feature: Tensor) -> Tensor:
    """Give the channels of a feature (N, C, H, W) the mean 0 and the standard deviation 1."""
    mean, deviation = channel_statistics(feature)
    return (feature.float() - mean) / deviation

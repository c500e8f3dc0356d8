# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings
from typing import Tuple

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import UserError


class FeatureLoss(nn.Module):
    """Base of the losses between a feature map of the student and one of the teacher.

    Attributes:
        kind (str): The loss of a group of layers is reported as ``loss_<kind>_<group>``.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """
    kind = 'feature'

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight
        self._warned_of_size = False

    def resize(self, teacher_map: Tensor, student_map: Tensor) -> Tensor:
        """Resize a map of the teacher to the size of the student's, with one warning.

        Args:
            teacher_map (Tensor): (N, C, H', W').
            student_map (Tensor): (N, C', H, W).

        Returns:
            Tensor: (N, C, H, W), the teacher's map itself if the sizes are equal.
        """
        size = student_map.shape[-2:]
        if teacher_map.shape[-2:] == size:
            return teacher_map
        if not self._warned_of_size:
            self._warned_of_size = True
            warnings.warn(f"the teacher's map of size {tuple(teacher_map.shape[-2:])} is resized "
                          f"to the student's {tuple(size)} to compare their {self.kind}")
        return F.interpolate(teacher_map, size=size, mode='bilinear', align_corners=False)


class AdaptedLoss(FeatureLoss):
    """Base of the losses that compare channel with channel.

    If the student has another number of channels than the teacher, a 1x1 convolution
    without a bias makes the teacher's number of them. It is trained beside the student.

    Args:
        loss_weight (float): Multiplier of the loss. Defaults to 1.0.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__(loss_weight)
        self.adapter = None

    def adapt(self, student_channels: int, teacher_channels: int) -> None:
        """Make the adapter if there is need of one.

        Args:
            student_channels (int): Number of channels of the student's feature.
            teacher_channels (int): Number of channels of the teacher's.
        """
        if student_channels != teacher_channels:
            self.adapter = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)

    def align(self, student_feature: Tensor, teacher_feature: Tensor) -> Tuple[Tensor, Tensor]:
        """Make two features comparable, in single precision.

        Args:
            student_feature (Tensor): (N, C, H, W).
            teacher_feature (Tensor): (N, C', H', W').

        Returns:
            tuple[Tensor, Tensor]: (N, C', H, W) each.
        """
        if self.adapter is not None:
            student_feature = self.adapter(student_feature)
        channels = student_feature.shape[1], teacher_feature.shape[1]
        if channels[0] != channels[1]:
            raise UserError(f"the student's {channels[0]} channels cannot be compared with the "
                            f"teacher's {channels[1]} without an adapter")
        student_feature, teacher_feature = student_feature.float(), teacher_feature.float()
        return student_feature, self.resize(teacher_feature, student_feature)

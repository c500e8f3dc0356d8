# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Distillation: a pruned detector learns from the features and predictions of a teacher."""
from .adapter_hook import DistillAdapterHook
from .cross_head_loss import CrossHeadLoss
from .distiller import SpatialAttentionDistiller
from .feature_losses import (
    ChannelWiseLoss,
    FeatureMimicLoss,
    PearsonLoss,
    SpatialAttentionLoss,
    spatial_attention,
)
from .features import FeatureRecorder, FrozenTeacher
from .localization_loss import LocalizationLoss
from .part_outputs import find_part_outputs
from .response_loss import ResponseLoss
from .soft_label_loss import SoftLabelLoss
from .weight_schedule import WeightSchedule

__all__ = [
    'ChannelWiseLoss', 'CrossHeadLoss', 'DistillAdapterHook', 'FeatureMimicLoss',
    'FeatureRecorder', 'FrozenTeacher', 'LocalizationLoss', 'PearsonLoss', 'ResponseLoss',
    'SoftLabelLoss', 'SpatialAttentionDistiller', 'SpatialAttentionLoss', 'WeightSchedule',
    'find_part_outputs', 'spatial_attention'
]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .adapter_hook import DistillAdapterHook
from .feature_recorder import FeatureRecorder
from .frozen_teacher import FrozenTeacher
from .losses import (
    ChannelWiseLoss,
    FeatureMimicLoss,
    ResponseLoss,
    SpatialAttentionLoss,
    spatial_attention,
)
from .part_outputs import find_part_outputs
from .spatial_attention_distiller import SpatialAttentionDistiller
from .weight_schedule import WeightSchedule

__all__ = [
    'ChannelWiseLoss', 'DistillAdapterHook', 'FeatureMimicLoss', 'FeatureRecorder',
    'FrozenTeacher', 'ResponseLoss', 'SpatialAttentionDistiller', 'SpatialAttentionLoss',
    'WeightSchedule', 'find_part_outputs', 'spatial_attention'
]

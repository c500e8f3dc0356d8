# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .feature_recorder import FeatureRecorder
from .frozen_teacher import FrozenTeacher
from .losses import SpatialAttentionLoss, spatial_attention
from .spatial_attention_distiller import SpatialAttentionDistiller

__all__ = [
    'FeatureRecorder', 'FrozenTeacher', 'SpatialAttentionDistiller', 'SpatialAttentionLoss',
    'spatial_attention'
]

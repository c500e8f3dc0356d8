# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Losses between a student and its teacher."""
from .attention import SpatialAttentionLoss, spatial_attention
from .channel_wise import ChannelWiseLoss
from .feature_loss import AdaptedLoss, FeatureLoss
from .mimic import FeatureMimicLoss
from .response import ResponseLoss, binary_kl_divergence

__all__ = [
    'AdaptedLoss', 'ChannelWiseLoss', 'FeatureLoss', 'FeatureMimicLoss', 'ResponseLoss',
    'SpatialAttentionLoss', 'binary_kl_divergence', 'spatial_attention'
]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .api import PruningResult, prune
from .importance import BNScale
from .pruned_detector import PrunedDetector, apply_channel_table, count_channels
from .structures import (
                         ChannelSlice,
                         CoupledChannels,
                         LayerGroup,
                         PruningError,
                         PruningPlan,
                         SetPlan,
)

__all__ = [
    'BNScale', 'ChannelSlice', 'CoupledChannels', 'LayerGroup', 'PrunedDetector', 'PruningError',
    'PruningPlan', 'PruningResult', 'SetPlan', 'apply_channel_table', 'count_channels', 'prune'
]

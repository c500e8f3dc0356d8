# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .api import prune
from .attributes import register_attribute_rule
from .auto_groups import auto_groups
from .importance import BNScale, Criterion, LayerwiseCriterion
from .plan import PruningPlan, SetPlan, validate_plan
from .pruned_detector import PrunedDetector, apply_channel_table, count_channels
from .result import PruningResult
from .structures import ChannelSlice, CoupledChannels, LayerGroup, PruningError
from .training_loss import Batch

__all__ = [
    'BNScale', 'Batch', 'ChannelSlice', 'CoupledChannels', 'Criterion', 'LayerGroup',
    'LayerwiseCriterion', 'PrunedDetector', 'PruningError', 'PruningPlan', 'PruningResult',
    'SetPlan', 'apply_channel_table', 'auto_groups', 'count_channels', 'prune',
    'register_attribute_rule', 'validate_plan'
]

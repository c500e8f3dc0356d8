# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .api import check_request, prune, rehearse_pruning
from .attributes import register_attribute_rule
from .detector import PrunedDetector, apply_channel_table, count_channels
from .layer_groups import auto_groups
from .plan import PruningPlan, PruningResult, UnitPlan, validate_plan
from .scores import BNScale, Criterion
from .units import ChannelSlice, ChannelUnit, LayerGroup

__all__ = [
    'BNScale', 'ChannelSlice', 'ChannelUnit', 'Criterion', 'LayerGroup', 'PrunedDetector',
    'PruningPlan', 'PruningResult', 'UnitPlan', 'apply_channel_table', 'auto_groups',
    'check_request', 'count_channels', 'prune', 'register_attribute_rule', 'rehearse_pruning',
    'validate_plan'
]

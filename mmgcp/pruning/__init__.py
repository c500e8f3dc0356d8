# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .api import check_request, prune, rehearse_pruning
from .attributes import register_attribute_rule
from .best_of import BestOf
from .channel_table import apply_channel_table, count_channels
from .detector import PrunedDetector
from .layer_groups import auto_groups
from .plan import BlockPlan, PruningPlan, UnitPlan, validate_plan
from .result import PruningResult
from .scores import BNScale, Criterion
from .units import ChannelSlice, ChannelUnit, LayerGroup

__all__ = [
    'BNScale', 'BestOf', 'BlockPlan', 'ChannelSlice', 'ChannelUnit', 'Criterion', 'LayerGroup',
    'PrunedDetector', 'PruningPlan', 'PruningResult', 'UnitPlan',
    'apply_channel_table', 'auto_groups', 'check_request', 'count_channels', 'prune',
    'register_attribute_rule', 'rehearse_pruning', 'validate_plan'
]

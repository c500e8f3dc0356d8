# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .hook import DynamicSparsityHook
from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    FeedbackSchedule,
    LinearSchedule,
    StepSchedule,
    TwoPhaseSchedule,
)
from .selection import ScaleFactors, find_gammas, select_scale_factors

__all__ = [
    'ConstantSchedule', 'CosineSchedule', 'DynamicSparsityHook', 'FeedbackSchedule',
    'LinearSchedule', 'ScaleFactors', 'StepSchedule', 'TwoPhaseSchedule', 'find_gammas',
    'select_scale_factors'
]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Sparse training: a penalty on the scale factors of BatchNorm layers, and its schedules."""
from .hook import DynamicSparsityHook
from .schedules import (
    ConstantSchedule,
    CosineSchedule,
    FeedbackSchedule,
    LinearSchedule,
    StepSchedule,
    TwoPhaseSchedule,
)
from .selection import select_scale_factors

__all__ = [
    'ConstantSchedule', 'CosineSchedule', 'DynamicSparsityHook', 'FeedbackSchedule',
    'LinearSchedule', 'StepSchedule', 'TwoPhaseSchedule', 'select_scale_factors'
]

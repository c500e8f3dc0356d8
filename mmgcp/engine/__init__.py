# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .hooks import DynamicSparsityHook
from .sparsity import (
    ConstantSchedule,
    CosineSchedule,
    FeedbackSchedule,
    LinearSchedule,
    StepSchedule,
    TwoPhaseSchedule,
)

__all__ = [
    'ConstantSchedule', 'CosineSchedule', 'DynamicSparsityHook', 'FeedbackSchedule',
    'LinearSchedule', 'StepSchedule', 'TwoPhaseSchedule'
]

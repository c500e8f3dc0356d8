# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The schedules' former place; they are in :mod:`mmgcp.engine.sparsity.schedules`."""
from .sparsity.schedules import (
    ConstantSchedule,
    CosineSchedule,
    FeedbackSchedule,
    LinearSchedule,
    StepSchedule,
    TwoPhaseSchedule,
)

__all__ = [
    'ConstantSchedule', 'CosineSchedule', 'FeedbackSchedule', 'LinearSchedule', 'StepSchedule',
    'TwoPhaseSchedule'
]

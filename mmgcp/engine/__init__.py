# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .hooks import DynamicSparsityHook
from .sparsity_schedules import ConstantSchedule, TwoPhaseSchedule

__all__ = ['ConstantSchedule', 'DynamicSparsityHook', 'TwoPhaseSchedule']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .complexity import ConvStatistics, count_complexity, record_convs
from .memory import measure_peak_memory

__all__ = ['ConvStatistics', 'count_complexity', 'measure_peak_memory', 'record_convs']

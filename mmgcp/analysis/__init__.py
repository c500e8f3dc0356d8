# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .complexity import ConvStatistics, count_complexity, record_convs
from .latency import measure_latency

__all__ = ['ConvStatistics', 'count_complexity', 'measure_latency', 'record_convs']

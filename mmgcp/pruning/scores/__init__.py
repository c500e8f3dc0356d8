# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .apoz import APoZ
from .base import Criterion, Random, criterion_names
from .gradients import GroupFisher, Taylor
from .surgeon import OBS
from .weights import FPGM, BNScale, L1Norm, L2Norm

__all__ = [
    'APoZ', 'BNScale', 'Criterion', 'FPGM', 'GroupFisher', 'L1Norm', 'L2Norm', 'OBS', 'Random',
    'Taylor', 'criterion_names'
]

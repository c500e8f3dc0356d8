# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .apoz import APoZ
from .base import Criterion, Random, criterion_names
from .bn_scale import BNScale
from .filters import FPGM, L1Norm, L2Norm
from .gradients import GroupFisher, Taylor

__all__ = [
    'APoZ', 'BNScale', 'Criterion', 'FPGM', 'GroupFisher', 'L1Norm', 'L2Norm', 'Random', 'Taylor',
    'criterion_names'
]

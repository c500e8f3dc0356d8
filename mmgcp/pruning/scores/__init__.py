# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .apoz import APoZ
from .base import Criterion, criterion_names
from .bn_scale import BNScale
from .fpgm import FPGM
from .group_fisher import GroupFisher
from .l1_norm import L1Norm
from .l2_norm import L2Norm
from .random_score import Random
from .taylor import Taylor

__all__ = [
    'APoZ', 'BNScale', 'Criterion', 'FPGM', 'GroupFisher', 'L1Norm', 'L2Norm', 'Random', 'Taylor',
    'criterion_names'
]

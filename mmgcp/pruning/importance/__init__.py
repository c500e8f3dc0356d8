# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .apoz import APoZ
from .bn_scale import BNScale
from .cpsca import CPSCA
from .criterion import Criterion
from .dcp import DCP
from .fisher import Fisher
from .fpgm import FPGM
from .l1_norm import L1Norm
from .l2_norm import L2Norm
from .layerwise_criterion import LayerwiseCriterion
from .lcp import LCP
from .random_score import Random
from .taylor import Taylor
from .thinet import ThiNet

__all__ = [
    'APoZ', 'BNScale', 'CPSCA', 'Criterion', 'DCP', 'FPGM', 'Fisher', 'L1Norm', 'L2Norm', 'LCP',
    'LayerwiseCriterion', 'Random', 'Taylor', 'ThiNet'
]

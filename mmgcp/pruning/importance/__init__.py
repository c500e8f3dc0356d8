# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .bn_scale import BNScale
from .criterion import Criterion
from .layerwise_criterion import LayerwiseCriterion

__all__ = ['BNScale', 'Criterion', 'LayerwiseCriterion']

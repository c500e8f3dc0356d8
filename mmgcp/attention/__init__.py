# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .cpsca import CPSCA
from .detector import SCADetector, plain_model_config
from .modules import SCAModule

__all__ = ['CPSCA', 'SCADetector', 'SCAModule', 'plain_model_config']

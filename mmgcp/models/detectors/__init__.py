# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .sca_detector import SCADetector, plain_model_config

__all__ = ['SCADetector', 'plain_model_config']

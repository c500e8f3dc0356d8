# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .cpsca import CPSCA
from .detector import SCADetector, plain_config
from .inserted import InsertedAttention, attention_aside, find_attention
from .modules import SCAModule

__all__ = [
    'CPSCA', 'InsertedAttention', 'SCADetector', 'SCAModule', 'attention_aside', 'find_attention',
    'plain_config'
]

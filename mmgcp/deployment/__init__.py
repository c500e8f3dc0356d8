# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors as files for other programs: written, checked, quantised and evaluated."""
from .api import Exported, export_detector
from .exported import ExportedModel, evaluate_exported, open_exported
from .fusion import fold_norms, fused
from .options import ExportOptions

__all__ = [
    'ExportOptions', 'Exported', 'ExportedModel', 'evaluate_exported', 'export_detector',
    'fold_norms', 'fused', 'open_exported'
]

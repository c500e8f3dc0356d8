# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Compressing a detector in four stages: baseline, sparse training, pruning, distilling."""
from .compress import CompressOptions, compress

__all__ = ['CompressOptions', 'compress']

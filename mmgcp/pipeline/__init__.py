# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .compress import CompressOptions, compress

__all__ = ['CompressOptions', 'compress']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .bn_scale import BNScale

__all__ = ['BNScale']

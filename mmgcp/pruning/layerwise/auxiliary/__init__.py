# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .criterion import AuxiliaryCriterion

__all__ = ['AuxiliaryCriterion']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .compensator import Compensator

__all__ = ['Compensator']

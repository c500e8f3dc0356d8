# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Compensation: the layers that stay make up for the channels that are removed."""
from .compensator import Compensator
from .reconstruction import Compensated

__all__ = ['Compensated', 'Compensator']

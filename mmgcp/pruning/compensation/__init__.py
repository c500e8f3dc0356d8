# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Compensation: the layers that stay make up for the channels that are removed."""
from .compensator import Compensator

__all__ = ['Compensator']

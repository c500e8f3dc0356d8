# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from . import engine  # noqa: F401  registers its strategy
from .base import LayerwiseCriterion
from .dcp import DCP
from .lcp import LCP
from .thinet import ThiNet

__all__ = ['DCP', 'LCP', 'LayerwiseCriterion', 'ThiNet']

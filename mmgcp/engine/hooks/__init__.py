# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .dynamic_sparsity_hook import DynamicSparsityHook

__all__ = ['DynamicSparsityHook']

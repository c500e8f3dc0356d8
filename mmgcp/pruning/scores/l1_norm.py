# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from torch import Tensor

from mmgcp.registry import TASK_UTILS

from .filters import FilterCriterion


@TASK_UTILS.register_module()
class L1Norm(FilterCriterion):
    """The sum of the absolute weights of a filter (`Pruning Filters for Efficient ConvNets
    <https://arxiv.org/abs/1608.08710>`_, section 3.1: s = sum |K|).

    Args:
        normalize (str), fold_norm (bool): See :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the sums of absolute weights (C, ) of filters (C, K)."""
        return filters.abs().sum(1)

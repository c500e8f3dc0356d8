# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch
from torch import Tensor

from mmgcp.registry import TASK_UTILS

from .filters import FilterCriterion


@TASK_UTILS.register_module()
class FPGM(FilterCriterion):
    """The sum of the distances of a filter to all others of its layer (`Filter Pruning via
    Geometric Median <https://arxiv.org/abs/1811.00250>`_: sum_j' |F_j - F_j'|).

    It is least for the filters next to the geometric median, which the others can stand in
    for, not for those with small weights. Filters of all groups of a grouped convolution are
    compared with each other.

    Args:
        normalize (str), fold_norm (bool): See :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the sums of Euclidean distances (C, ) of filters (C, K)."""
        return torch.cdist(filters, filters).sum(1)

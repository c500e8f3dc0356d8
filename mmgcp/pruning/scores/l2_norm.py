# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from torch import Tensor

from mmgcp.registry import TASK_UTILS

from .filters import FilterCriterion


@TASK_UTILS.register_module()
class L2Norm(FilterCriterion):
    """The Euclidean norm of a filter (`Soft Filter Pruning
    <https://arxiv.org/abs/1808.06866>`_, its lp-norm of a filter with p = 2).

    Args:
        normalize (str), fold_norm (bool): See :class:`FilterCriterion`.
    """

    def measure(self, filters: Tensor) -> Tensor:
        """Return the Euclidean norms (C, ) of filters (C, K)."""
        return filters.square().sum(1).sqrt()

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one path from a model to a pruned model."""
from pathlib import Path
from typing import Any, Optional

import torch.nn as nn

from mmgcp.registry import TASK_UTILS

from . import one_shot  # noqa: F401  registers its strategy
from .apply import apply_decision
from .masking import restored_on_error
from .options import Groups, PruneOptions
from .plan import PruningPlan, validate_plan
from .result import PruningResult
from .strategy import Decision, strategy_of, trace


def prune(model: nn.Module, groups: Groups = 'auto', ratio: Optional[float] = None,
          **options: Any) -> PruningResult:
    """Prune the channels of a detector in groups of layers.

    Group channel pruning, `GCP-SAD (arXiv 2306.01526)
    <https://arxiv.org/abs/2306.01526>`_. The model is traced to find its channel units;
    their channels are scored; the layer groups are allocated thresholds; the channels below
    these are selected, as far as limits allow; the layers that stay are compensated; and the
    channels are removed, which is verified.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``, or a
            two-stage detector of MMDetection. It is pruned in place.
        groups (str | Sequence[LayerGroup | dict]): The layer groups. Each has a ratio, a
            threshold, or leaves its threshold to the budget. ``'auto'`` makes them by
            kind of module and stride; see :func:`mmgcp.pruning.auto_groups`.
        ratio (float, optional): Pruning ratio of all groups, instead of their own.
        **options: Any other option of :class:`mmgcp.pruning.options.PruneOptions`.

    Returns:
        PruningResult: The pruned model, the plan and figures for a report.

    Raises:
        PruningError: The request cannot be met; the model has not been touched.
    """
    options = PruneOptions.of(groups=groups, ratio=ratio, **options)
    plan, criterion = options.plan, None
    if isinstance(plan, (str, Path)):
        plan = PruningPlan.load(plan)
    task = trace(model, options)
    if plan is None:
        criterion = TASK_UTILS.build(options.criterion)
    else:
        validate_plan(plan, task.units)
    trains = criterion is not None and criterion.trains and not options.dry_run
    with restored_on_error(model, weights=trains):
        decision = Decision(plan) if plan is not None else strategy_of(criterion)(task, criterion)
        return apply_decision(task, decision)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one path from a model to a pruned model."""
from pathlib import Path
from typing import Any, Dict, Optional

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import find_layer, is_depthwise
from mmgcp.nn.precision import full_precision
from mmgcp.nn.temporarily import restored_on_error
from mmgcp.registry import build_task_util
from mmgcp.utils.options import check_names

from .detector import ChannelTable, count_channels
from .layer_groups import Groups
from .options import PruneOptions
from .plan import PruningPlan, PruningResult, validate_plan
from .scores import Criterion
from .strategy import Decision, PruningTask, decide, trace
from .surgery import gather_channels, remove_and_verify


@full_precision()
def prune(model: nn.Module, groups: Groups = 'auto', ratio: Optional[float] = None,
          **options: Any) -> PruningResult:
    """Prune the channels of a detector in groups of layers.

    Group channel pruning, `GCP-SAD (arXiv 2306.01526)
    <https://arxiv.org/abs/2306.01526>`_. The model is traced to find its channel units;
    their channels are scored; the layer groups are allocated thresholds; the channels below
    these are selected, as far as limits allow; the layers that stay are compensated; and the
    channels are removed, which is verified. All of this runs on the device of the model, in the
    precision of its parameters, whatever autocast and TF32 are set to. Of several processes of a
    torch.distributed group, each calls this with the same model and options, but with batches of
    its own; all get the same plan and weights.

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
    check_names(PruneOptions, options, 'prune()', PruningError)
    options = PruneOptions(groups=groups, ratio=ratio, **options)
    plan, criterion = options.plan, None
    if isinstance(plan, (str, Path)):
        plan = PruningPlan.load(plan)
    task = trace(model, options)
    if plan is None:
        criterion = build_task_util(options.criterion, Criterion, PruningError)
    else:
        validate_plan(plan, task.units)
    in_place = not options.dry_run and (task.compensator().fits_weights
                                        or criterion is not None and criterion.trains)
    with restored_on_error(model, weights=in_place):
        decision = Decision(plan) if plan is not None else decide(criterion, task)
        return _apply(task, decision)


def _apply(task: PruningTask, decision: Decision) -> PruningResult:
    """Compensate and remove what has been decided on, unless it is a dry run; give the result."""
    removed, progress = decision.plan.removed(), task.options.progress
    params, macs = task.cost(removed)
    result = PruningResult(
        model=task.model,
        plan=decision.plan,
        channels_before=count_channels(task.model),
        channels_after=_channels_left(task, removed),
        params=[task.cost.params, params],
        macs=[task.cost.macs, macs],
        scores=decision.scores)
    if task.options.dry_run:
        return result
    done = decision.compensated
    if done is None:
        progress('compensating', 0, 1)
        done = task.compensator()(removed)
        progress('compensating', 1, 1)
    result.uncompensated, result.fits = done.incomplete, done.fits
    remove_and_verify(task.model, task.units, removed, task.shape, progress)
    return result


def _channels_left(task: PruningTask, removed: Dict[str, Tensor]) -> ChannelTable:
    """Return the channels of all layers after pruning."""
    left = count_channels(task.model)
    for (name, side), channels in gather_channels(task.units, removed).items():
        counts = left[name]
        counts[0 if side == 'in' else -1] -= len(channels)
        if is_depthwise(find_layer(task.model, name)):
            counts[0] = counts[-1]
    return left

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one path from a model to a pruned model."""
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, Tuple

import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.nn.forward import head_left_out_on_demand
from mmgcp.nn.precision import full_precision
from mmgcp.nn.temporarily import restored_on_error
from mmgcp.registry import build_task_util
from mmgcp.utils.options import check_names

from .depth import (
    Depth,
    back_after,
    blocks_only,
    choose_depth,
    made_up_for_blocks,
    rehearsed_depth,
    without_blocks,
)
from .iterative import decide_in_steps
from .latency_target import check_latency_request
from .layer_groups import Groups
from .options import TARGETS, PruneOptions
from .plan import PruningPlan, validate_plan
from .result import PruningResult
from .scores import BNScale, Criterion
from .strategy import Decision, PruningTask, decide, trace


@full_precision()
def prune(model: nn.Module, groups: Groups = 'auto', ratio: Optional[float] = None,
          **options: Any) -> PruningResult:
    """Prune the channels of a detector in groups of layers, and whole blocks if that is wanted.

    Group channel pruning, `GCP-SAD (arXiv 2306.01526)
    <https://arxiv.org/abs/2306.01526>`_. The model is traced to find its channel units;
    their channels are scored; the layer groups are allocated thresholds; the channels below
    these are selected, as far as limits allow; the layers that stay are compensated; and the
    channels are removed, which is verified. With ``steps`` above 1 this happens once a step; see
    :mod:`mmgcp.pruning.iterative`. With ``remove_blocks`` it happens to what is left without these;
    see :mod:`mmgcp.pruning.depth`. All of this runs on the device of the model, in the
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
    options = check_request(groups=groups, ratio=ratio, **options)
    with head_left_out_on_demand(model):
        return _prune(model, options)


def _prune(model: nn.Module, options: PruneOptions) -> PruningResult:
    """Trace a model, decide unless there is a plan, and apply what has been decided."""
    criterion = None
    if options.plan is None:
        criterion = build_task_util(options.criterion, Criterion, PruningError)
    whole = trace(model, options)
    depth = choose_depth(whole, _prune)
    builds_on = options.steps > 1 or criterion is not None and criterion.trains
    in_place = not options.dry_run and (
        whole.compensator().fits_weights or options.recover is not None or builds_on)
    original = copy.deepcopy(model) if options.recover is not None and in_place else None
    with back_after(model, options.dry_run and bool(depth.names)), \
            restored_on_error(model, weights=in_place):
        task = without_blocks(whole, depth)
        if task.options.plan is not None:
            validate_plan(task.options.plan, task.units)
            decision = Decision(task.options.plan)
        elif task.options.only_blocks:
            decision = blocks_only(task)
        else:
            with made_up_for_blocks(task, for_good=builds_on) as task:
                task, decision = _decide(criterion, task, original)
        return _apply(whole, task, depth, decision, original)


def _decide(criterion: Criterion, task: PruningTask,
            original: Optional[nn.Module]) -> Tuple[PruningTask, Decision]:
    """Decide on channels; return the task, of which steps may be done, and the decision."""
    if task.options.steps > 1:
        return decide_in_steps(criterion, task, original)
    return task, decide(criterion, task)


def check_request(**options: Any) -> PruneOptions:
    """Check the options of :func:`prune` as far as that needs no model.

    Args:
        **options: The options.

    Returns:
        PruneOptions: The options.

    Raises:
        PruningError: One is unknown or not allowed, the plan or the latency table cannot be
            read, the program for ``target_latency`` is not installed, or the criterion cannot
            be built.
    """
    check_names(PruneOptions, options, 'prune()', PruningError)
    options = PruneOptions(**options)
    if isinstance(options.plan, (str, Path)):
        options.plan = PruningPlan.load(options.plan)
    if options.plan is None:
        criterion = build_task_util(options.criterion, Criterion, PruningError)
        if options.steps > 1 and criterion.not_in_steps is not None:
            raise PruningError(f'{type(criterion).__name__} cannot prune in {options.steps} steps: '
                               f'{criterion.not_in_steps}')
        if options.remove_blocks is not None and criterion.not_without_blocks is not None:
            raise PruningError(f'{type(criterion).__name__} cannot prune what removed blocks '
                               f'leave: {criterion.not_without_blocks}')
        if options.finetune is not None and options.steps == 1 and not (
                criterion.trains or options.only_blocks):
            raise PruningError('finetune is for layer-wise criteria, but '
                               f'{options.criterion["type"]} is none, or for several steps')
        if criterion.needs_budget and not options.only_blocks and all(
                getattr(options, name) is None for name in TARGETS):
            raise PruningError(f'{type(criterion).__name__} needs a budget: target_params, '
                               'target_flops or target_latency')
        if options.target_latency is not None:
            check_latency_request(options)
    return options


def rehearse_pruning(model: nn.Module, **options: Any) -> None:
    """Find whether a model can be pruned like this, whatever its weights will be.

    Layer groups are looked up, and the budget is compared with the least that can be left.
    Criteria that need data are replaced by BNScale; how near a budget can be met depends on the
    scores and is left open.

    Args:
        model (nn.Module): The model, which is not changed.
        **options: As for :func:`prune`.

    Raises:
        PruningError: The request cannot be met.
    """
    options = check_request(**options)
    options = replace(options, batches=None, calibration=None, evaluate=None, compensate=False,
                      steps=1, dry_run=True)
    with head_left_out_on_demand(model), back_after(model, True):
        _rehearse(model, options)


def _rehearse(model: nn.Module, options: PruneOptions) -> None:
    whole = trace(model, options)
    task = without_blocks(whole, rehearsed_depth(whole))
    if options.plan is not None:
        validate_plan(task.options.plan, task.units)
        return
    if options.only_blocks:
        return
    if task.latency is not None:  # trained weights will need other channels
        task = replace(task, latency=replace(task.latency, verify=False))
    criterion = build_task_util(options.criterion, Criterion, PruningError)
    if criterion.needs and not (criterion.trains and criterion.allocation_criterion is None):
        criterion = BNScale()
        task = replace(task, options=replace(task.options, allocation='global'))
    shares = [replace(task.budget, strict=False, **{other: None}) for other in ('flops', 'params')]
    for budget in list(filter(None, shares)) or [task.budget]:  # together depends on the scores
        decide(criterion, replace(task, budget=budget))


def _apply(whole: PruningTask, task: PruningTask, depth: Depth, decision: Decision,
           original: Optional[nn.Module]) -> PruningResult:
    """Compensate, remove what has been decided on, and recover, unless it is a dry run."""
    plan = depth.noted_in(decision.plan)
    removed = plan.removed()
    params, macs = task.cost(removed)
    result = PruningResult(
        model=task.model,
        plan=plan,
        channels_before=whole.cost.channels,
        channels_after=task.cost.channels_left(removed),
        params=[whole.cost.params, params],
        macs=[whole.cost.macs, macs],
        scores=decision.scores,
        latency={} if task.options.plan else plan.options.get('latency', {}),
        absent_blocks=depth.absent,
        depths=depth.tried)
    if not task.options.dry_run:
        done = task.carry_out(removed, decision.compensated)
        result.uncompensated, result.fits = done.incomplete, done.fits
        result.compensation = task.compensator().mode or ''
        if task.options.recover is not None:
            result.recovery = task.recover(removed, original)
    return result

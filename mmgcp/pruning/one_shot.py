# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning in one go: score all channels, allocate, select."""
from dataclasses import asdict, replace
from typing import Dict, Sequence, Tuple

from torch import Tensor

from mmgcp.errors import PruningError

from .allocate import allocate, by_position
from .budget import Budget
from .compensation import Compensator
from .layer_groups import make_groups
from .plan import PruningPlan, make_plan
from .scored import group_scores, score_units
from .scores import Criterion
from .select import Limits, Selection
from .sensitivity import measure_sensitivity
from .strategy import Decision, PruningTask, register_strategy
from .units import ChannelUnit


@register_strategy(Criterion)
def prune_in_one_go(task: PruningTask, criterion: Criterion) -> Decision:
    """Decide on all units at once, by the scores of a criterion."""
    options = task.options
    if options.finetune is not None:
        raise PruningError('finetune is for layer-wise criteria, but '
                           f'{options.criterion["type"]} is none')
    uniform = (options.allocation or criterion.default_allocation) == 'uniform'
    return Decision(*plan_by_scores(task, criterion, task.units, uniform, task.compensator()))


def plan_by_scores(task: PruningTask, criterion: Criterion, units: Sequence[ChannelUnit],
                   uniform: bool, compensator: Compensator
                   ) -> Tuple[PruningPlan, Dict[str, Tensor]]:
    """Score units, find the thresholds of the layer groups and select the channels below them.

    If the allocation is uniform, all units of a group lose the same share, see
    :mod:`mmgcp.pruning.allocate`. The compensator is for measuring sensitivities. Returns the
    plan for all units of the task, and the scores (K, ) by layer group, which are empty if
    positions decide. Raises a PruningError if the request cannot be met.
    """
    model, options = task.model, task.options
    groups = make_groups(model, options.groups, options.ratio, options.input_shape)
    if uniform:  # a ratio holds for each unit, as a threshold of positions
        groups = [group if group.ratio is None else
                  replace(group, ratio=None, threshold=float(group.ratio)) for group in groups]
    task.check_data(criterion)
    criterion.prepare(model, units, options.batches, options.progress)
    scored = score_units(model, units, criterion, groups, task.skipped)
    if options.groups == 'auto':
        used = {name for item in scored for name in item.group_names()}
        groups = [group for group in groups if group.name in used]
    merge = options.merge
    if uniform:
        # Then all layers of a unit have the same positions, of which a sum is no share
        scored, merge = by_position(scored, merge), 'mean' if merge == 'sum' else merge
    selection = Selection(scored, merge, Limits(options.min_keep_ratio, options.round_to))
    sensitivity = None
    if options.evaluate is not None:
        sensitivity = measure_sensitivity(model, selection, groups, options.evaluate,
                                          compensator, options.progress)
    options.progress('choosing channels', 0, 1)
    thresholds = allocate(selection, groups, task.cost,
                          Budget(options.target_params, options.target_flops),
                          sensitivity and sensitivity.costs)
    options.progress('choosing channels', 1, 1)
    plan = make_plan(task.units, selection.removed(thresholds), scored)
    record = dict(options.record(), sensitivity=sensitivity and asdict(sensitivity))
    plan = replace(plan, thresholds=dict(thresholds), skipped=task.skipped, options=record)
    scores = {} if uniform else {group.name: group_scores(scored, group) for group in groups}
    return plan, scores

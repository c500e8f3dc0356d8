# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is to be pruned, and how that is decided: in one go, or as other strategies do."""
from dataclasses import asdict, dataclass, field, replace
from functools import singledispatch
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import record_convs
from mmgcp.errors import PruningError
from mmgcp.nn.distributed import from_first_rank
from mmgcp.nn.forward import working_shape

from .allocate import allocate, by_position, measure_sensitivity
from .budget import Budget
from .compensation import Compensator
from .cost import CostModel
from .graph import find_units
from .layer_groups import make_groups
from .options import PruneOptions
from .plan import PruningPlan, make_plan
from .scored import group_scores, score_units
from .scores import Criterion
from .select import Limits, Selection
from .units import ChannelUnit


@dataclass(frozen=True)
class PruningTask:
    """A detector that has been traced, and what is wanted."""
    model: nn.Module
    options: PruneOptions
    units: List[ChannelUnit]
    skipped: Dict[str, str]  # layers that are left alone, with the reason; strategies add some
    cost: CostModel
    shape: Sequence[int]  # (C, H, W) of a small image that the detector runs on

    def compensator(self, images: Optional[Iterable[Tensor]] = None) -> Compensator:
        """Make the compensator for batches (N, C, H, W), else for the calibration images."""
        images = self.options.calibration if images is None else images
        return Compensator(self.model, self.units, self.options.compensate, images, self.shape)

    def check_data(self, criterion: Criterion) -> None:
        """Raise a PruningError if a criterion needs training data and there are none."""
        if criterion.needs and self.options.batches is None:
            raise PruningError(f'the criterion {type(criterion).__name__} needs training data, but '
                               'there are none: give batches (--calib-batches of tools/prune.py)')


@dataclass
class Decision:
    """What a strategy has decided."""
    plan: PruningPlan
    scores: Dict[str, Tensor] = field(default_factory=dict)  # (K, ) by layer group, for a report
    # Layers that could not absorb everything, None if compensation has yet to be done
    uncompensated: Optional[List[str]] = None


def trace(model: nn.Module, options: PruneOptions) -> PruningTask:
    """Find the channel units of a detector and what they cost."""
    options.progress('tracing', 0, 2)
    shape = working_shape(model, options.input_shape)
    units, skipped = find_units(model, shape)
    options.progress('tracing', 1, 2)
    cost = CostModel(model, record_convs(model, options.input_shape), units)
    options.progress('tracing', 2, 2)
    return PruningTask(model, options, units, skipped, cost, shape)


@singledispatch
def decide(criterion: Criterion, task: PruningTask) -> Decision:
    """Decide what is removed: on all units at once, by the scores of a criterion.

    ``@decide.register(Kind)`` registers another strategy for criteria of a kind.
    """
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
    return from_first_rank(plan), scores  # whatever metrics others have measured

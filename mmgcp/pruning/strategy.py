# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is to be pruned, and how that is decided: in one go, or as other strategies do."""
import math
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial, singledispatch
from typing import Dict, Iterable, List, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import record_convs
from mmgcp.datasets.batch_accuracy import average_precision
from mmgcp.errors import PruningError, told
from mmgcp.nn.distributed import first_items, from_first_rank
from mmgcp.nn.training_loss import Batch

from .allocate import allocate, by_position, thresholds_of_groups
from .budget import Budget
from .compensation import Compensated, Compensator
from .cost import CostModel
from .latency_target import Choice, LatencyTarget, latency_target
from .layer_groups import make_groups
from .options import PruneOptions
from .plan import PruningPlan, make_plan
from .prunable import find_prunable_or_leave_head_out
from .remaining import remaining_channels, remaining_units, with_gone_channels
from .rounding import give_back
from .scored import ScoredUnit, group_scores, score_units
from .scores import Criterion
from .select import Limits, Selection
from .sensitivity import Sensitivity, measure_sensitivity
from .surgery import check_finite, gather_channels, remove_and_verify
from .units import ChannelUnit, LayerGroup

# Images that compensation has while sensitivities are measured
MEASURED_BATCHES = 4
# With a lower average precision on the batches a detector has not learnt enough to measure them
LEAST_PRECISION = 0.05


@dataclass(frozen=True)
class PruningTask:
    """A detector that has been traced, and what is wanted.

    Units, costs and all plans are those of the detector as it was traced. Since then it may have
    lost channels, which are among the channels that plans remove.
    """
    model: nn.Module
    options: PruneOptions
    units: List[ChannelUnit]
    skipped: Dict[str, str]  # layers that are left alone, with the reason; strategies add some
    cost: CostModel
    shape: Sequence[int]  # (C, H, W) of a small image that the detector runs on
    budget: Budget
    gone: Dict[str, Tensor] = field(default_factory=dict)  # (K, ) channels it has lost, by unit
    uncompensated: Sequence[str] = ()  # layers that could not absorb all that these emitted
    latency: Optional[LatencyTarget] = None  # a time that is wanted
    original: Optional[nn.Module] = None  # with the blocks that the detector has been left without

    @property
    def spent(self) -> CostModel:
        """What the budget is spent by: parameters, and MACs or time."""
        return self.cost if self.latency is None else self.latency.cost

    @cached_property
    def left(self) -> List[ChannelUnit]:
        """The units of the detector as it is now."""
        return remaining_units(self.units, self.gone)

    def recover(self, removed: Dict[str, Tensor], original: nn.Module) -> dict:
        """Let the detector, which has lost channels (K, ) of units, follow the original."""
        found = self.options.recover(self.model, original, gather_channels(self.units, removed))
        check_finite(self.model, 'recovery has failed, and the model has been restored')
        return found

    def compensator(self, images: Optional[Iterable[Tensor]] = None) -> Compensator:
        """Make the compensator for batches (N, C, H, W), else for the calibration images."""
        images = self.options.calibration if images is None else images
        return Compensator(self.model, self.left, self.options.compensate, images, self.shape,
                           self.original)

    def carry_out(self, removed: Dict[str, Tensor],
                  compensated: Optional[Compensated]) -> Compensated:
        """Remove channels (K, ) by name of the unit, with a check, and compensate before.

        What compensation has done is given where that was before. Returns it, with what earlier
        steps left incomplete.
        """
        progress, removed = self.options.progress, remaining_channels(removed, self.gone)
        if compensated is None:
            progress('compensating', 0, 1)
            compensated = self.compensator()(removed)
            progress('compensating', 1, 1)
        check_finite(self.model, 'compensation or training has failed, and the model has been '
                     'restored')
        remove_and_verify(self.model, self.left, removed, self.shape, progress)
        incomplete = [*self.uncompensated, *compensated.incomplete]
        return replace(compensated, incomplete=list(dict.fromkeys(incomplete)))

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
    compensated: Optional[Compensated] = None  # None if compensation has yet to be done


def trace(model: nn.Module, options: PruneOptions,
          whole: Optional[Tuple[int, int]] = None) -> PruningTask:
    """Find the channel units of a detector and what they cost.

    From now on its head is left out of all runs if it cannot be traced. If blocks have been
    removed, ``whole`` has the parameters and MACs with them, of which budgets are shares; if some
    are to be, times are of no interest yet.
    """
    options.progress('tracing', 0, 2)
    check_finite(model, 'the model cannot be pruned')
    units, skipped, shape = find_prunable_or_leave_head_out(model, options.input_shape)
    options = replace(options, input_shape=(shape[0], *options.input_shape[1:]))
    check_finite(model, 'the model cannot be pruned', shape)
    options.progress('tracing', 1, 2)
    cost = CostModel(model, record_convs(model, options.input_shape), units, whole)
    options.progress('tracing', 2, 2)
    budget, latency = Budget(options.target_params, options.target_flops), None
    if (options.target_latency is not None and options.plan is None
            and (whole is not None or options.remove_blocks is None)):
        latency = latency_target(model, cost, options)
        budget = replace(budget, flops=latency.share, quantities=latency.cost.quantities)
    return PruningTask(model, options, units, skipped, cost, shape, budget, latency=latency)


@singledispatch
def decide(criterion: Criterion, task: PruningTask) -> Decision:
    """Decide what is removed: on all units at once, by the scores of a criterion.

    ``@decide.register(Kind)`` registers another strategy for criteria of a kind.
    """
    options = task.options
    allocation = options.allocation or criterion.default_allocation
    plan, scores = plan_by_scores(task, criterion, task.units, allocation)
    if options.steps > 1:
        plan.options.update(finetune=options.finetune_settings)
    return Decision(plan, scores)


def plan_by_scores(task: PruningTask, criterion: Criterion, units: Sequence[ChannelUnit],
                   allocation: str) -> Tuple[PruningPlan, Dict[str, Tensor]]:
    """Score units, find the thresholds of the layer groups and select the channels below them.

    The allocation is explained in :mod:`mmgcp.pruning.allocate`. Returns the plan for all units
    of the task, and the scores (K, ) by layer group, which are empty if positions decide. Raises
    a PruningError if the request cannot be met.
    """
    model, options, positions = task.model, task.options, allocation != 'global'
    groups = make_groups(model, options.groups, options.ratio, options.input_shape)
    if positions:  # a ratio holds for each unit, as a threshold of positions
        groups = [group if group.ratio is None else
                  replace(group, ratio=None, threshold=float(group.ratio)) for group in groups]
    task.check_data(criterion)
    names = {unit.name for unit in units}
    left = [unit for unit in task.left if unit.name in names]
    criterion.prepare(model, left, options.batches, options.progress)
    scored = score_units(model, left, criterion, groups, task.skipped)
    if options.groups == 'auto':
        used = {name for item in scored for name in item.group_names()}
        groups = [group for group in groups if group.name in used]
    sensitivity = _measure(task, _selection(options, scored, positions), groups, allocation)
    options.progress('choosing channels', 0, 1)
    selection = _selection(options, with_gone_channels(scored, units, task.gone), positions,
                           task.gone)
    choose = partial(_choose, task, selection, groups, sensitivity, positions)
    latency = {}
    if task.latency is not None and task.budget.flops == task.latency.share:
        (thresholds, removed), latency = task.latency.meet(choose, task.budget, model, task.left,
                                                           task.gone)
    else:  # another budget, or one on the way to a time
        thresholds, removed = choose(task.budget)
    options.progress('choosing channels', 1, 1)
    plan = make_plan(task.units, removed, scored)
    record = dict(options.record(), allocation=allocation,
                  sensitivity=sensitivity and asdict(sensitivity))
    if latency:
        record['latency'] = latency
    plan = replace(plan, thresholds=dict(thresholds), skipped=task.skipped, options=record)
    scores = {} if positions else {group.name: group_scores(scored, group) for group in groups}
    return from_first_rank(plan), scores  # whatever others have decided by their rounding errors


def _choose(task: PruningTask, selection: Selection, groups: Sequence[LayerGroup],
            sensitivity: Optional[Sensitivity], positions: bool, budget: Budget) -> Choice:
    """Find the thresholds for a budget, and the channels (K, ) that go, by name of the unit."""
    thresholds = allocate(selection, groups, task.spent, budget, sensitivity and sensitivity.costs,
                          1. if positions and sensitivity else 0.5)
    removed = selection.removed(thresholds)
    if task.options.round_to > 1 and budget:
        fixed = thresholds_of_groups(selection.scored, groups)
        removed = give_back(selection, thresholds, fixed, removed, task.spent, budget)
    return thresholds, removed


def _measure(task: PruningTask, selection: Selection, groups: Sequence[LayerGroup],
             allocation: str) -> Optional[Sensitivity]:
    """Measure how much depends on layer groups that leave it to a budget, if that is wanted.

    The metric is the one that is given, or for the allocation 'measured' the average precision
    on the batches. Compensation for it has to do with a few of the images.
    """
    options, evaluate, least = task.options, task.options.evaluate, -math.inf
    groups = [group for group in groups if group.ratio is None and group.threshold is None]
    if evaluate is None and allocation == 'measured' and options.batches is not None:
        evaluate, least = partial(_precision_on, options.batches), LEAST_PRECISION
    if evaluate is None or not task.budget or len(groups) < 2:
        return None
    images = options.calibration and first_items(options.calibration, MEASURED_BATCHES)
    return measure_sensitivity(task.model, selection, groups, allocation != 'global', evaluate,
                               task.compensator(images), options.progress, least)


def _precision_on(batches: Iterable[Batch], model: nn.Module) -> float:
    """Return the average precision on batches, or say how to do without."""
    try:
        return average_precision(model, batches)
    except Exception as error:  # whatever the model raises
        raise PruningError(
            f'the average precision on the training data cannot be measured: '
            f'{told(error)}; allocation uniform does without it') from error


def _selection(options: PruneOptions, scored: Sequence[ScoredUnit], positions: bool,
               gone: Optional[Dict[str, Tensor]] = None) -> Selection:
    """Make the selection among scored units, by positions or by scores."""
    merge = options.merge
    if positions:
        # Then all layers of a unit have the same positions, of which a sum is no share
        scored, merge = by_position(scored, merge), 'mean' if merge == 'sum' else merge
    return Selection(scored, merge, Limits(options.min_keep_ratio, options.round_to), gone or {})

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning one channel unit after the other, in the order in which the model computes them."""
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Dict, List, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.datasets.calibration import ImagesOf
from mmgcp.errors import PruningError
from mmgcp.nn.distributed import from_first_rank
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.nn.temporarily import only_values_change
from mmgcp.pruning.allocate import EqualShares
from mmgcp.pruning.compensation import Compensated, Compensator
from mmgcp.pruning.compensation.folding import Values
from mmgcp.pruning.resume import Unfinished, digest_request
from mmgcp.pruning.scores import Criterion
from mmgcp.pruning.select import Limits, select_lowest
from mmgcp.pruning.strategy import Decision, PruningTask, decide, plan_by_scores
from mmgcp.pruning.surgery import channels_off
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import build_task_util

from .base import LayerwiseCriterion


@decide.register(LayerwiseCriterion)
def prune_layer_by_layer(criterion: LayerwiseCriterion, task: PruningTask) -> Decision:
    """Decide how many channels each unit loses, then prune one unit after the other.

    In a dry run nothing is scored: the plan tells how many channels go, but not which.
    """
    options = task.options
    allocator = _allocation_criterion(criterion, options.allocation)
    reasons = {unit.name: criterion.skips(task.model, unit) for unit in task.units}
    task.skipped.update((item.module, reasons[unit.name]) for unit in task.units
                        for item in unit.side('out') if reasons[unit.name] is not None)
    if not options.dry_run:
        task.check_data(criterion)
    images = options.calibration
    if images is None and options.batches is not None:
        images = ImagesOf(options.batches)
    compensator = task.compensator(images)
    units = [unit for unit in task.units if reasons[unit.name] is None]
    plan, _ = plan_by_scores(
        task, allocator, units, 'uniform' if criterion.allocation_criterion is None else 'global')
    plan.options.update(finetune=options.finetune_settings, only_counts=options.dry_run)
    if options.dry_run:
        return Decision(plan)
    criterion.expect_folding(bool(options.compensate))
    allocated = plan.removed()
    unfinished = Unfinished(options.checkpoint_file,
                            digest_request(asdict(plan), options.batches, task.model))
    run = LayerByLayer(task, criterion, compensator)
    run([unit for unit in order_units(task.model, task.units, task.shape)
         if unit.name in allocated], allocated, unfinished)
    gone = {name: channels.tolist() for name, channels in run.removed.items()}
    plan = replace(plan, units=[replace(item, removed=gone.get(item.name, []))
                                for item in plan.units])
    return Decision(plan, compensated=Compensated(list(dict.fromkeys(run.uncompensated)), run.fits))


def _allocation_criterion(criterion: LayerwiseCriterion, allocation: Optional[str]) -> Criterion:
    """Return the criterion whose scores decide how many channels each unit loses."""
    if allocation not in (None, criterion.default_allocation):
        raise PruningError(
            f'allocation is {allocation!r}, but {type(criterion).__name__} goes layer by layer: '
            "it is 'uniform' there, unless the criterion's option allocation_criterion "
            'names another criterion that decides how many channels go')
    if criterion.allocation_criterion is None:
        return EqualShares()
    found = build_task_util(criterion.allocation_criterion, Criterion, PruningError)
    if isinstance(found, LayerwiseCriterion):
        raise PruningError('allocation_criterion must be one that scores all units at once, but '
                           f'{type(found).__name__} goes layer by layer')
    return found


def order_units(model: nn.Module, units: Sequence[ChannelUnit],
                shape: Sequence[int]) -> List[ChannelUnit]:
    """Order units by when the model first computes one of their layers, never-run units last.

    The model runs on an image of the given shape (C, H, W).
    """
    layers = {item.module: find_layer(model, item.module)
              for unit in units for item in unit.side('out')}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHT_TYPES)}
    first: Dict[str, int] = {}
    for number, (name, _, _) in enumerate(record_shapes(model, layers, shape)):
        first.setdefault(name, number)
    return sorted(units, key=lambda unit: min(
        first.get(item.module, math.inf) for item in unit.side('out')))


@dataclass
class LayerByLayer:
    """Prunes units of a task; the channels are switched off meanwhile, but not removed.

    At the end the model is adapted to what it was before the first unit (by default, layers are
    fitted to their outputs of then), unless there is fine-tuning, which leaves it in a better
    state.
    """
    task: PruningTask
    criterion: LayerwiseCriterion
    compensator: Compensator
    removed: Dict[str, Tensor] = field(default_factory=dict)  # (K, ) of each finished unit
    uncompensated: List[str] = field(default_factory=list)  # layers that could not absorb all
    fits: Dict[str, str] = field(default_factory=dict)  # how layers were fitted at the end

    def __call__(self, units: Sequence[ChannelUnit], allocated: Dict[str, Tensor],
                 unfinished: Unfinished) -> None:
        """Prune units in order: of each as many channels as were allocated, by its name."""
        model, finetune = self.task.model, self.task.options.finetune
        progress = self.task.options.progress
        with ExitStack() as off:
            reference = self._begin(units, unfinished, off)
            for number, unit in enumerate(units):
                if unit.name in self.removed:
                    continue
                progress('pruning layers', number, len(units))
                self._prune(unit, allocated[unit.name], off)
                if finetune is not None:
                    with only_values_change(model):
                        finetune(model, number + 1)
                unfinished.save(model=model.state_dict(), removed=self.removed,
                                uncompensated=self.uncompensated,
                                criterion=self.criterion.state_dict(),
                                reference=reference and reference.state_dict())
            progress('pruning layers', len(units), len(units))
        done = self.compensator.adapt(self.removed, reference)
        self.uncompensated, self.fits = self.uncompensated + done.incomplete, done.fits

    def _begin(self, units: Sequence[ChannelUnit], unfinished: Unfinished,
               off: ExitStack) -> Optional[nn.Module]:
        """Begin with the first unit, or resume after the last one that was finished.

        Return the copy of the model that it is adapted to at the end, if it is.
        """
        model, options, state = self.task.model, self.task.options, unfinished.load()
        if state is None:
            self.criterion.begin(model, units, options.batches, options.progress)
        reference = self.compensator.reference() if options.finetune is None else None
        if state is not None:
            if reference is not None:
                reference.load_state_dict(state['reference'])
            model.load_state_dict(state['model'])
            self.criterion.load_state_dict(state['criterion'])
            self.removed, self.uncompensated = state['removed'], state['uncompensated']
            options.progress('resuming', len(self.removed), len(units))
            off.enter_context(channels_off(model, units, self.removed))
        return reference

    def _prune(self, unit: ChannelUnit, allocated: Tensor, off: ExitStack) -> None:
        """Choose channels of a unit, fold their means, switch them off and adapt the weights."""
        model, options = self.task.model, self.task.options
        scores = from_first_rank(self.criterion.score(model, unit, options.batches).cpu())
        chosen = select_lowest(unit, scores, allocated,
                               Limits(options.min_keep_ratio, options.round_to))
        self.removed[unit.name] = chosen
        if len(chosen):
            self.uncompensated += self.compensator.fold(
                {unit.name: chosen}, self._known_means(unit, chosen))
            off.enter_context(channels_off(model, [unit], self.removed))
            self.criterion.update(model, unit, chosen, options.batches)

    def _known_means(self, unit: ChannelUnit, chosen: Tensor) -> Optional[Values]:
        """Return the means (K, ) of chosen channels, if scoring measured them on the images."""
        images, means = self.compensator.images, self.criterion.mean_inputs(unit)
        if means is None or not (isinstance(images, ImagesOf)
                                 and images.batches is self.task.options.batches):
            return None
        mask = unit.mask(chosen)
        known = {item.module: {norms: mean[mask[item.unit_index].to(mean.device)]
                               for norms, mean in means[item.module].items()}
                 for item in unit.side('in') if item.module in means}
        return {name: values for name, values in known.items()
                if all(map(len, values.values()))}

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning one channel unit after the other, in the order in which the model computes them."""
import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Dict, List, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.datasets.calibration import ImagesOf
from mmgcp.errors import PruningError
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.nn.temporarily import only_values_change
from mmgcp.pruning.allocate import EqualShares
from mmgcp.pruning.compensation import Compensator
from mmgcp.pruning.compensation.folding import Values
from mmgcp.pruning.masking import channels_off
from mmgcp.pruning.one_shot import plan_by_scores
from mmgcp.pruning.scores import Criterion
from mmgcp.pruning.select import Limits, select_lowest
from mmgcp.pruning.strategy import Decision, PruningTask, register_strategy
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import LayerwiseCriterion
from .resume import Unfinished, digest_request


@register_strategy(LayerwiseCriterion)
def prune_layer_by_layer(task: PruningTask, criterion: LayerwiseCriterion) -> Decision:
    """Decide how many channels each unit loses, then prune one unit after the other.

    In a dry run nothing is scored: the plan tells how many channels go, but not which.
    """
    options = task.options
    allocator = _allocation_criterion(criterion, options.allocation)
    units = _without_skipped(task, criterion)
    if not options.dry_run:
        task.check_data(criterion)
    images = options.calibration
    if images is None and options.batches is not None:
        images = ImagesOf(options.batches)
    compensator = task.compensator(images)
    plan, _ = plan_by_scores(task, allocator, units, criterion.allocation_criterion is None,
                             compensator)
    finetune = options.finetune and getattr(options.finetune, 'settings', True)
    plan.options.update(finetune=finetune, only_counts=options.dry_run)
    if options.dry_run:
        return Decision(plan)
    criterion.expect_folding(bool(options.compensate))
    allocated = plan.removed()
    unfinished = Unfinished(options.checkpoint_file,
                            digest_request(plan, options.batches, task.model))
    run = LayerByLayer(task, criterion, compensator)
    run([unit for unit in order_units(task.model, task.units, task.shape)
         if unit.name in allocated], allocated, unfinished)
    gone = {name: channels.tolist() for name, channels in run.removed.items()}
    plan = replace(plan, units=[replace(item, removed=gone.get(item.name, []))
                                for item in plan.units])
    return Decision(plan, uncompensated=list(dict.fromkeys(run.uncompensated)))


def _allocation_criterion(criterion: LayerwiseCriterion, allocation: Optional[str]) -> Criterion:
    """Return the criterion whose scores decide how many channels each unit loses.

    It is that of the criterion's option, or :class:`mmgcp.pruning.allocate.EqualShares`.
    """
    if allocation not in (None, criterion.default_allocation):
        raise PruningError(
            f'allocation is {allocation!r}, but {type(criterion).__name__} goes layer by layer: '
            "it is 'uniform' there, unless the criterion's option allocation_criterion "
            'names another criterion that decides how many channels go')
    if criterion.allocation_criterion is None:
        return EqualShares()
    found = TASK_UTILS.build(criterion.allocation_criterion)
    if isinstance(found, LayerwiseCriterion):
        raise PruningError('allocation_criterion must be one that scores all units at once, but '
                           f'{type(found).__name__} goes layer by layer')
    return found


def _without_skipped(task: PruningTask, criterion: LayerwiseCriterion) -> List[ChannelUnit]:
    """Return the units that a criterion prunes, and note in the task why it skips the others."""
    kept = []
    for unit in task.units:
        reason = criterion.skips(task.model, unit)
        if reason is None:
            kept.append(unit)
        else:
            task.skipped.update((item.module, reason) for item in unit.side('out'))
    return kept


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


class LayerByLayer:
    """Prunes units of a task; the channels are switched off meanwhile, but not removed.

    At the end the BatchNorms are adapted to the model as it was before the first unit, unless
    there is fine-tuning, which leaves them in a better state.

    Attributes:
        removed (dict[str, Tensor]): The channels (K, ) of each finished unit, by its name.
        uncompensated (list[str]): Layers that could not absorb what removed channels emit.
    """

    def __init__(self, task: PruningTask, criterion: LayerwiseCriterion,
                 compensator: Compensator):
        self._model = task.model
        self._options = task.options
        self._limits = Limits(task.options.min_keep_ratio, task.options.round_to)
        self._criterion = criterion
        self._compensator = compensator
        self.removed: Dict[str, Tensor] = {}
        self.uncompensated: List[str] = []

    def __call__(self, units: Sequence[ChannelUnit], allocated: Dict[str, Tensor],
                 unfinished: Unfinished) -> None:
        """Prune units in order: of each as many channels as were allocated, by its name."""
        progress, finetune = self._options.progress, self._options.finetune
        with ExitStack() as off:
            reference = self._begin(units, unfinished, off)
            for number, unit in enumerate(units):
                if unit.name in self.removed:
                    continue
                progress('pruning layers', number, len(units))
                self._prune(unit, allocated[unit.name], off)
                if finetune is not None:
                    with only_values_change(self._model):
                        finetune(self._model, number + 1)
                unfinished.save(model=self._model.state_dict(), removed=self.removed,
                                uncompensated=self.uncompensated,
                                criterion=self._criterion.state_dict(),
                                reference=reference and reference.state_dict())
            progress('pruning layers', len(units), len(units))
        self._compensator.adapt(self.removed, reference)

    def _begin(self, units: Sequence[ChannelUnit], unfinished: Unfinished,
               off: ExitStack) -> Optional[nn.Module]:
        """Begin with the first unit, or resume after the last one; return the reference, if any.

        The reference is the copy of the model that the BatchNorms are adapted to.
        """
        state = unfinished.load()
        if state is None:
            self._criterion.begin(self._model, units, self._options.batches,
                                  self._options.progress)
        trains = self._options.finetune is not None
        reference = None if trains else self._compensator.reference()
        if state is None:
            return reference
        if reference is not None:
            reference.load_state_dict(state['reference'])
        self._model.load_state_dict(state['model'])
        self._criterion.load_state_dict(state['criterion'])
        self.removed, self.uncompensated = state['removed'], state['uncompensated']
        self._options.progress('resuming', len(self.removed), len(units))
        off.enter_context(channels_off(self._model, units, self.removed))
        return reference

    def _prune(self, unit: ChannelUnit, allocated: Tensor, off: ExitStack) -> None:
        """Choose channels of a unit, fold their means, switch them off and adapt the weights."""
        scores = self._criterion.score(self._model, unit, self._options.batches)
        chosen = select_lowest(unit, scores, allocated, self._limits)
        self.removed[unit.name] = chosen
        if len(chosen):
            self.uncompensated += self._compensator.fold(
                {unit.name: chosen}, self._known_means(unit, chosen))
            off.enter_context(channels_off(self._model, [unit], self.removed))
            self._criterion.update(self._model, unit, chosen, self._options.batches)

    def _known_means(self, unit: ChannelUnit, chosen: Tensor) -> Optional[Values]:
        """Return the means of chosen channels (K, ), if they have been measured for the scores.

        They count only if they have been measured on the images of the compensation.
        """
        images, means = self._compensator.images, self._criterion.mean_inputs(unit)
        if means is None or not (isinstance(images, ImagesOf)
                                 and images.batches is self._options.batches):
            return None
        mask = unit.mask(chosen)
        known = {item.module: {norms: mean[mask[item.unit_index].to(mean.device)]
                               for norms, mean in means[item.module].items()}
                 for item in unit.side('in') if item.module in means}
        return {name: values for name, values in known.items()
                if all(map(len, values.values()))}

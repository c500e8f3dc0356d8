# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning one channel unit after the other, in the order in which the model computes them."""
import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.datasets.calibration import ImagesOf
from mmgcp.errors import PruningError
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.allocate import EqualShares
from mmgcp.pruning.compensation import Compensator
from mmgcp.pruning.compensation.folding import Values
from mmgcp.pruning.plan import PruningPlan, make_plan
from mmgcp.pruning.scores import Criterion
from mmgcp.pruning.select import Limits, select_lowest
from mmgcp.pruning.strategy import Decision, PruningTask, decide, plan_by_scores
from mmgcp.pruning.surgery import channels_off
from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import LayerwiseCriterion
from .resume import Unfinished, digest_request

# Trains a model in place after so many units, with the removed channels off
Finetune = Callable[[nn.Module, int], None]


@decide.register(LayerwiseCriterion)
def prune_layer_by_layer(criterion: LayerwiseCriterion, task: PruningTask) -> Decision:
    """Decide how many channels each unit loses, then prune one unit after the other.

    In a dry run nothing is scored: the plan tells how many channels go, but not which.
    """
    options = task.options
    allocator = allocation_criterion(criterion, options.allocation)
    units = without_skipped(task, criterion)
    if not options.dry_run:
        task.check_data(criterion)
    images = options.calibration
    if images is None and options.batches is not None:
        images = ImagesOf(options.batches)
    compensator = task.compensator(images)
    plan, _ = plan_by_scores(task, allocator, units, criterion.allocation_criterion is None,
                             compensator)
    plan.options.update(finetune=settings_of(options.finetune), only_counts=options.dry_run)
    if options.dry_run:
        return Decision(plan)
    criterion.expect_folding(bool(options.compensate))
    run = LayerByLayer(
        model=task.model,
        criterion=criterion,
        limits=Limits(options.min_keep_ratio, options.round_to),
        compensator=compensator,
        batches=options.batches,
        finetune=options.finetune,
        progress=options.progress)
    unfinished = Unfinished(options.checkpoint_file,
                            digest_request(plan, options.batches, task.model))
    removed, uncompensated = run(order_units(task.model, task.units, task.shape), plan.removed(),
                                 unfinished)
    return Decision(_with_removed(plan, task.units, removed), uncompensated=uncompensated)


def allocation_criterion(criterion: LayerwiseCriterion, allocation: Optional[str]) -> Criterion:
    """Return the criterion whose scores decide how many channels each unit loses.

    Args:
        criterion (LayerwiseCriterion): The criterion that then decides which.
        allocation (str, optional): What the user says of the allocation.

    Returns:
        Criterion: That of its option, or :class:`mmgcp.pruning.allocate.EqualShares`.

    Raises:
        PruningError: The one of its option goes layer by layer itself, or the user says
            something else.
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


def without_skipped(task: PruningTask, criterion: LayerwiseCriterion) -> List[ChannelUnit]:
    """Return the units that a criterion prunes; the task learns why others are left alone."""
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
    """Order units by when the model first computes a layer of theirs.

    Args:
        model (nn.Module): The model.
        units (Sequence[ChannelUnit]): The units.
        shape (Sequence[int]): Shape (C, H, W) of an image in pixels that the model runs on.

    Returns:
        list[ChannelUnit]: The units; those whose layers never run come last.
    """
    layers = {item.module: find_layer(model, item.module)
              for unit in units for item in unit.side('out')}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHT_TYPES)}
    first: Dict[str, int] = {}
    for number, (name, _, _) in enumerate(record_shapes(model, layers, shape)):
        first.setdefault(name, number)
    return sorted(units, key=lambda unit: min(
        first.get(item.module, math.inf) for item in unit.side('out')))


def settings_of(finetune: Optional[Finetune]) -> Union[None, bool, dict]:
    """Return what is known of a fine-tuning: its settings, True for another, None for none."""
    return None if finetune is None else getattr(finetune, 'settings', True)


def _with_removed(plan: PruningPlan, units: Sequence[ChannelUnit],
                  removed: Dict[str, Tensor]) -> PruningPlan:
    """The plan with other channels removed."""
    gone = {item.name: item.removed for item in make_plan(units, removed).units}
    return replace(plan, units=[replace(item, removed=gone[item.name]) for item in plan.units])


@dataclass
class LayerByLayer:
    """Prunes one unit after the other.

    Attributes:
        model (nn.Module): The model. Its weights are adapted in place; the channels are off
            meanwhile, but not removed.
        criterion (LayerwiseCriterion): Chooses channels and adapts weights.
        limits (Limits): How many channels of each unit have to stay.
        compensator (Compensator): Folds what the channels of a unit emit before they go. At the
            end it adapts the BatchNorms to the model as it was before the first unit, unless
            there is fine-tuning, which changes them for the better.
        batches (Iterable[Batch]): Training batches.
        finetune (Callable, optional): Called with the model and the number of finished units
            after each unit.
        progress (Callable): Called with a stage, the steps done in it, and all its steps.
    """
    model: nn.Module
    criterion: LayerwiseCriterion
    limits: Limits
    compensator: Compensator
    batches: Iterable[Batch]
    finetune: Optional[Finetune]
    progress: Callable[[str, int, int], None]

    def __call__(self, units: Sequence[ChannelUnit], allocated: Dict[str, Tensor],
                 unfinished: Unfinished) -> Tuple[Dict[str, Tensor], List[str]]:
        """Prune units.

        Args:
            units (Sequence[ChannelUnit]): The units, in order.
            allocated (dict[str, Tensor]): As many channels as each unit loses, by its name.
            unfinished (Unfinished): Where to save the state after each unit, and to go on from.

        Returns:
            tuple: The removed channels by name of the unit, and the layers that could not
            absorb what removed channels emit.
        """
        units = [unit for unit in units if unit.name in allocated]
        with ExitStack() as off:
            removed, uncompensated, reference = self._begin(units, unfinished, off)
            for number, unit in enumerate(units):
                if unit.name in removed:
                    continue
                self.progress('pruning layers', number, len(units))
                uncompensated += self._prune(unit, allocated[unit.name], removed, off)
                if self.finetune is not None:
                    with undisturbed(self.model):
                        self.finetune(self.model, number + 1)
                unfinished.save(model=self.model.state_dict(), removed=removed,
                                uncompensated=uncompensated,
                                criterion=self.criterion.state_dict(),
                                reference=reference and reference.state_dict())
            self.progress('pruning layers', len(units), len(units))
        self.compensator.adapt(removed, reference)
        return ({name: channels for name, channels in removed.items() if len(channels)},
                list(dict.fromkeys(uncompensated)))

    def _begin(self, units: Sequence[ChannelUnit], unfinished: Unfinished,
               off: ExitStack) -> Tuple[Dict[str, Tensor], List[str], Optional[nn.Module]]:
        """Begin with the first unit, or go on after those that have been pruned before."""
        state = unfinished.load()
        if state is None:
            self.criterion.begin(self.model, units, self.batches, self.progress)
            return {}, [], self._reference()
        reference = self._reference()
        if reference is not None:
            reference.load_state_dict(state['reference'])
        self.model.load_state_dict(state['model'])
        self.criterion.load_state_dict(state['criterion'])
        self.progress('resuming', len(state['removed']), len(units))
        off.enter_context(channels_off(self.model, units, state['removed']))
        return state['removed'], state['uncompensated'], reference

    def _reference(self) -> Optional[nn.Module]:
        return None if self.finetune is not None else self.compensator.reference()

    def _prune(self, unit: ChannelUnit, allocated: Tensor, removed: Dict[str, Tensor],
               off: ExitStack) -> List[str]:
        """Switch channels of a unit off, add them to the removed ones, and adapt the weights."""
        scores = self.criterion.score(self.model, unit, self.batches)
        chosen = select_lowest(unit, scores, allocated, self.limits)
        removed[unit.name] = chosen
        if not len(chosen):
            return []
        uncompensated = self.compensator.fold(
            {unit.name: chosen}, self._known_means(unit, chosen))
        off.enter_context(channels_off(self.model, [unit], removed))
        self.criterion.update(self.model, unit, chosen, self.batches)
        return uncompensated

    def _known_means(self, unit: ChannelUnit, chosen: Tensor) -> Optional[Values]:
        """What chosen channels emit on average, if the scores have measured it on the images."""
        images, means = self.compensator.images, self.criterion.mean_inputs(unit)
        if means is None or not (isinstance(images, ImagesOf) and images.batches is self.batches):
            return None
        mask = unit.mask(chosen)
        known = {item.module: {norms: mean[mask[item.unit_index].to(mean.device)]
                               for norms, mean in means[item.module].items()}
                 for item in unit.side('in') if item.module in means}
        return {name: values for name, values in known.items()
                if all(map(len, values.values()))}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model be trained: only its weights and statistics are others afterwards.

    Modes, gradients, what needs gradients, and the device are restored.

    Args:
        model (nn.Module): The model.
    """
    modes = {module: module.training for module in model.modules()}
    params = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    device = next(model.parameters()).device
    for param, _, _ in params:
        param.grad = None
    try:
        yield
    finally:
        model.to(device)
        for module, mode in modes.items():
            module.training = mode
        for param, needs_grad, grad in params:
            param.requires_grad_(needs_grad)
            param.grad = grad

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Depth pruning: which blocks are removed as a whole, before channels are."""
import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Sequence

import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import first_items, from_first_rank
from mmgcp.nn.temporarily import Snapshot, values_kept
from mmgcp.registry import build_task_util

from .blocks.finding import RESIDUAL, Blocks, find_blocks
from .blocks.plans import check_names, fit_units, list_of_names, plan_blocks
from .blocks.removal import AbsentBlocks, remove_blocks_and_verify
from .blocks.scores import block_costs, mean_loss, order_blocks
from .budget import percent
from .options import AUTO, BUDGETS, PruneOptions
from .plan import PruningPlan, make_plan
from .scores import Criterion
from .strategy import MEASURED_BATCHES, Decision, PruningTask, trace

MOST_TRIED = 6  # blocks that 'auto' removes at most


@dataclass(frozen=True)
class Depth:
    """The blocks of a detector, and which of them are removed."""
    blocks: Blocks
    names: Sequence[str] = ()  # of those that are removed
    scores: Dict[str, float] = field(default_factory=dict)  # of those that were scored
    tried: List[dict] = field(default_factory=list)  # numbers of blocks and the losses they led to

    @property
    def absent(self) -> AbsentBlocks:
        """What is removed."""
        return self.blocks.absent(self.names)

    def noted_in(self, plan: PruningPlan) -> PruningPlan:
        """Return a plan for channels that also says which blocks are removed."""
        options = dict(plan.options, depth=self.tried) if self.tried else plan.options
        return replace(plan, blocks=plan_blocks(self.blocks, self.scores, self.names),
                       skipped_blocks=self.blocks.skipped, options=options)


def choose_depth(task: PruningTask, run: Callable[[nn.Module, PruneOptions], Any]) -> Depth:
    """Decide which blocks of a detector, which is traced as a whole, are removed.

    Args:
        task (PruningTask): The detector, which is not changed, and what is wanted.
        run (Callable): Prunes a model with options; used on copies.

    Returns:
        Depth: The blocks.

    Raises:
        PruningError: There are no such blocks, not enough of them, or no training data to
            choose by.
    """
    options, blocks = task.options, find_blocks(task.model, task.shape)
    wanted = options.remove_blocks if options.plan is None else options.plan.removed_blocks
    if wanted is None:
        return Depth(blocks)
    if not isinstance(wanted, int) and wanted != AUTO:
        check_names(wanted, blocks)
        return Depth(blocks, list(wanted))
    found = candidates(blocks, 0 if wanted == AUTO else wanted, options.plain_blocks)
    if options.batches is None:
        raise PruningError(f'remove_blocks={wanted!r} needs training data to choose blocks by, but '
                           'there are none: give batches (--calib-batches of tools/prune.py), or '
                           'name the blocks')
    number = min(len(found), MOST_TRIED) if wanted == AUTO else wanted
    batches = first_items(options.batches, MEASURED_BATCHES)
    ordered = from_first_rank(order_blocks(
        task.model, blocks.absent(found), number, options.block_criterion, batches,
        options.input_shape, partial(_without_one, task, batches, run), options.progress))
    depth = Depth(blocks, [name for name, _ in ordered], dict(ordered))
    return _best_of(depth, task, batches, run) if wanted == AUTO else depth


def rehearsed_depth(task: PruningTask) -> Depth:
    """Choose blocks without training data: those that are named, or as many as are wanted.

    Raises:
        PruningError: There are no such blocks, or not enough of them.
    """
    options = task.options
    if options.plan is None and (options.remove_blocks == AUTO
                                 or isinstance(options.remove_blocks, int)):
        blocks = find_blocks(task.model, task.shape)
        number = 0 if options.remove_blocks == AUTO else options.remove_blocks
        return Depth(blocks, candidates(blocks, number, options.plain_blocks)[:number])
    return choose_depth(task, lambda *_: None)


def candidates(blocks: Blocks, number: int, plain: bool) -> List[str]:
    """Return the names of the blocks to choose a number from.

    Args:
        blocks (Blocks): Those of a detector.
        number (int): How many will be chosen.
        plain (bool): Whether blocks without a shortcut may be.

    Returns:
        list[str]: The names.

    Raises:
        PruningError: There are fewer.
    """
    found = [block.name for block in blocks.found if plain or block.kind == RESIDUAL]
    if number > len(found):
        raise PruningError(f'{number} blocks are to be removed, but the detector has {len(found)} '
                           f'{"" if plain else "residual "}blocks that can be: '
                           f'{list_of_names(found)}')
    return found


def _best_of(depth: Depth, task: PruningTask, batches: list,
             run: Callable[[nn.Module, PruneOptions], Any]) -> Depth:
    """Try to remove none, the first one, two, ... of the blocks; return the best of these.

    The budget is met by channels each time; the training loss on a few batches decides.
    """
    progress, losses, problem = task.options.progress, {}, None
    costs, whole = block_costs(task.model, depth.names, task.options.input_shape), task.cost.whole
    for number in range(len(depth.names) + 1):
        progress('trying numbers of blocks', number, len(depth.names) + 1)
        names = list(depth.names[:number])
        left = [1 - sum(costs[name][index] for name in names) / whole[index] for index in (0, 1)]
        if number and task.budget.exceeded(*left):
            break
        model = copy.deepcopy(task.model)
        try:
            run(model, _for_a_try(task.options, names, batches))
            losses[number] = mean_loss(model, batches, lambda *_: None)
        except PruningError as error:  # the budget, which may be met with more blocks
            problem = problem or error
    progress('trying numbers of blocks', len(depth.names) + 1, len(depth.names) + 1)
    if not losses:
        raise problem
    best = from_first_rank(min(losses, key=losses.get))
    return replace(depth, names=depth.names[:best], tried=[
        dict(blocks=number, loss=loss) for number, loss in losses.items()])


def _without_one(task: PruningTask, batches: list, run: Callable[[nn.Module, PruneOptions], Any],
                 name: str) -> nn.Module:
    """Return a copy of a detector without a block, compensated with a few images."""
    model, options = copy.deepcopy(task.model), _for_a_try(task.options, [name], batches)
    run(model, replace(options, groups='auto', **dict.fromkeys(BUDGETS)))
    return model


def _for_a_try(options: PruneOptions, names: List[str], batches: list) -> PruneOptions:
    """Return options for a quick try: a few images, one step, and no training."""
    criterion = options.criterion
    if build_task_util(criterion, Criterion, PruningError).trains:
        criterion = dict(type='mmgcp.OBS')
    calibration = options.calibration and first_items(options.calibration, MEASURED_BATCHES)
    return replace(options, remove_blocks=names or None, criterion=criterion, batches=batches,
                   calibration=calibration, evaluate=None, steps=1, finetune=None, recover=None,
                   checkpoint_file=None, dry_run=False, progress=lambda *_: None)


def without_blocks(task: PruningTask, depth: Depth) -> PruningTask:
    """Remove the chosen blocks of a detector, with a check, and trace what is left.

    Budgets and shares remain those of the whole. A plan is fitted to what is left.
    """
    options = task.options
    if depth.names or options.remove_blocks is not None:
        original = copy.deepcopy(task.model) if depth.names else None
        remove_blocks_and_verify(task.model, depth.absent, task.shape)
        task = replace(trace(task.model, options, task.cost.whole), original=original)
        if task.latency is not None and original is not None:
            task = replace(task, latency=task.latency.beside(original))
        shares = task.spent.shares({})
        if options.plan is None and task.budget.exceeded(*shares):
            warnings.warn(f'the removed blocks alone leave {percent(shares[0])} of the parameters '
                          f'and {percent(shares[1])} of the {task.budget.quantities[1]}, less '
                          'than there is to be left', stacklevel=4)
            task = replace(task, budget=replace(task.budget, strict=False))
    if options.plan is not None:
        plan = replace(options.plan, units=fit_units(options.plan, task.units))
        task = replace(task, options=replace(options, plan=plan))
    return task


@contextmanager
def made_up_for_blocks(task: PruningTask, for_good: bool) -> Iterator[PruningTask]:
    """Let a detector make up for absent blocks while channels are scored.

    Afterwards it is as before, as it will make up for blocks and channels at once; or it stays
    so for good, as what else is done to its weights builds on that.
    """
    compensator = task.compensator()
    original = None if task.original is None else compensator.reference()
    if original is None:  # or the mode does not make up for blocks
        yield task
        return
    model = task.model
    if for_good:
        compensator.adapt({}, original)
        yield replace(task, original=None)
        return
    few = first_items(task.options.calibration, MEASURED_BATCHES)
    with values_kept([*model.parameters(), *model.buffers()]):
        task.compensator(few).adapt({}, original)
        yield task


def blocks_only(task: PruningTask) -> Decision:
    """Return the decision to remove no channels."""
    plan = make_plan(task.units, {})
    return Decision(replace(plan, skipped=task.skipped, options=task.options.record()))


@contextmanager
def back_after(model: nn.Module, dry_run: bool) -> Iterator[None]:
    """Put a model back after a dry run, also the blocks that it was tried without."""
    snapshot = Snapshot(model, weights=True) if dry_run else None
    try:
        yield
    finally:
        if snapshot is not None:
            snapshot.restore()

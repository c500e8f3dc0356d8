# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning in several steps, with training in between.

Step i of N removes what leaves the share t**(i / N) of the parameters or MACs if t is what is
wanted, so that each step removes the same share of what it finds. The shares are those of the
original, so that the last step meets the request as one step alone would. In each step the
channels are scored anew, on the model as it is then, which has been compensated, perhaps trained,
and checked against the one before. Which channels are removed in all is one plan for the original.

Pruning and training in turns is from `Learning both Weights and Connections (arXiv 1506.02626)
<https://arxiv.org/abs/1506.02626>`_, the same share in each turn from `The Lottery Ticket
Hypothesis (arXiv 1803.03635) <https://arxiv.org/abs/1803.03635>`_, where weights are removed
instead of channels.
"""
import warnings
from dataclasses import asdict, is_dataclass, replace
from typing import Any, Callable, Dict, Optional, Set, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.temporarily import only_values_change
from mmgcp.registry import build_task_util

from .budget import percent
from .options import PruneOptions
from .resume import Unfinished, digest_request
from .scores import Criterion
from .strategy import Decision, PruningTask, decide
from .surgery import remove_channels


def decide_in_steps(criterion: Criterion, task: PruningTask,
                    original: Optional[nn.Module] = None) -> Tuple[PruningTask, Decision]:
    """Prune and train a detector in all steps but the last, and decide on what the last removes.

    After each of these steps there is the training of the option ``finetune``, or else that of
    ``recover``, for which the original is needed. Returns the task with what has been done, and
    the decision. Finished steps are in the checkpoint file, if there is one, and are not
    repeated. In a dry run the model stays as it is, and a single step is decided on. Raises a
    PruningError, before anything is changed, if the request cannot be met.
    """
    options = task.options
    if options.dry_run:
        return task, decide(criterion, task)
    unfinished = Unfinished(options.checkpoint_file,
                            digest_request(_describe(options), options.batches, task.model))
    state, done, before_last = unfinished.load(), 0, options.steps - 1
    if state is None:
        _decide(replace(task, options=replace(options, evaluate=None)))  # whether it can be met
    else:
        task, done = _resumed(task, state), state['done']
        options.progress('resuming steps', done, options.steps)
    for number in range(done + 1, options.steps):
        options.progress('pruning in steps', number - 1, before_last)
        task = _step(task, number, original)
        unfinished.save(done=number, gone=task.gone, uncompensated=list(task.uncompensated),
                        model=task.model.state_dict())
    options.progress('pruning in steps', before_last, before_last)
    decision = decide(criterion, replace(task, budget=replace(task.budget, strict=False)))
    _warn_if_missed(task, decision)
    return task, decision


def _step(task: PruningTask, number: int, original: Optional[nn.Module]) -> PruningTask:
    """Take a step and train afterwards; return what is left to do.

    Nothing is done if the smallest step would lead beyond the whole request, or there is nothing
    to remove.
    """
    options = task.options
    portion = number / options.steps
    decision = _decide(replace(task, options=_on_the_way(options, portion),
                               budget=task.budget.on_the_way(portion)))
    removed = decision.plan.removed()
    if task.budget.exceeded(*task.spent.shares(removed)) or _same(removed, task.gone):
        return task
    done = task.carry_out(removed, decision.compensated)
    if options.finetune is not None:
        _train(task.model, options.finetune, number)
    elif options.recover is not None:
        with only_values_change(task.model):
            task.recover(removed, original)
    return replace(task, gone=removed, uncompensated=done.incomplete)


def _warn_if_missed(task: PruningTask, decision: Decision) -> None:
    """Warn if the last step ends farther from the budget than a single one may."""
    budget, shares = task.budget, task.spent.shares(decision.plan.removed())
    least = 0 if task.options.round_to > 1 else 1 - budget.tolerance
    for share, target, name in zip(shares, (budget.params, budget.flops), budget.quantities):
        if target is not None and not least <= share / target <= 1 + budget.tolerance:
            warnings.warn(f'{percent(share)} of the {name} are left instead of {percent(target)}, '
                          'which is the nearest that can be reached from what earlier steps have '
                          'left',
                          stacklevel=2)


def _decide(task: PruningTask) -> Decision:
    """Decide what a step removes, with a criterion that knows nothing of the steps before."""
    criterion = build_task_util(task.options.criterion, Criterion, PruningError)
    return decide(criterion, replace(task, skipped=dict(task.skipped)))


def _on_the_way(options: PruneOptions, portion: float) -> PruneOptions:
    """Return the options whose ratios are those at a point of the way, in (0, 1)."""
    groups = options.groups
    if not isinstance(groups, str):
        groups = [_with_ratio(group, portion) for group in groups]
    return replace(options, groups=groups, ratio=_ratio_at(options.ratio, portion))


def _with_ratio(group: Any, portion: float) -> Any:
    """Return a layer group, or the config of one, with its ratio at a point of the way."""
    if isinstance(group, dict):
        return dict(group, ratio=_ratio_at(group['ratio'], portion)) if 'ratio' in group else group
    return replace(group, ratio=_ratio_at(group.ratio, portion))


def _ratio_at(ratio: Any, portion: float) -> Any:
    """Return the ratio, if there is one, of which each equal portion keeps the same share."""
    return ratio and 1 - (1 - ratio)**portion


def _same(removed: Dict[str, Tensor], gone: Dict[str, Tensor]) -> bool:
    """Whether no more channels are removed than are gone, which are among them."""
    return sum(map(len, removed.values())) == sum(map(len, gone.values()))


def _train(model: nn.Module, finetune: Callable[[nn.Module, int], None], number: int) -> None:
    """Train a model after a step; a PruningError if that leads to values that are not finite."""
    before = _not_finite(model)
    with only_values_change(model):
        finetune(model, number)
    if _not_finite(model) - before:
        raise PruningError(f'the training after step {number} has diverged: there are weights that '
                           'are not finite; give it a smaller learning rate (lr of finetune)')


def _not_finite(model: nn.Module) -> Set[str]:
    """Return the names of parameters and buffers with values that are not finite."""
    return {name for name, value in (*model.named_parameters(), *model.named_buffers())
            if not bool(value.isfinite().all())}


def _describe(options: PruneOptions) -> Dict[str, Any]:
    """Return what tells a request from another one, for a digest."""
    groups = options.groups if isinstance(options.groups, str) else [
        asdict(group) if is_dataclass(group) else dict(group) for group in options.groups]
    return dict(options.record(), groups=groups, finetune=options.finetune_settings,
                recover=options.recover_settings, calibration=options.calibration is not None,
                evaluate=options.evaluate is not None)


def _resumed(task: PruningTask, state: Dict[str, Any]) -> PruningTask:
    """Give a detector the channels and weights that it had after the last finished step."""
    remove_channels(task.model, task.units, state['gone'])
    task.model.load_state_dict(state['model'])
    return replace(task, gone=state['gone'], uncompensated=state['uncompensated'])

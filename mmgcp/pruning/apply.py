# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""From a decision to a pruned model: compensate, remove and verify."""
from typing import Dict, Iterable, List

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import find_layer, is_depthwise

from .detector import ChannelTable, count_channels
from .masking import channels_off, check_same_predictions, raw_predictions
from .result import PruningResult
from .strategy import Decision, PruningTask
from .surgery import gather_channels, remove_channels
from .units import ChannelUnit


def apply_decision(task: PruningTask, decision: Decision) -> PruningResult:
    """Prune a model as decided, unless it is a dry run, and say what that leads to.

    Args:
        task (PruningTask): The task, whose model changes in place.
        decision (Decision): The decision.

    Returns:
        PruningResult: The result.

    Raises:
        PruningError: The pruned model does not compute what it has to.
    """
    removed = decision.plan.removed()
    params, macs = task.cost(removed)
    result = PruningResult(
        model=task.model,
        plan=decision.plan,
        channels_before=count_channels(task.model),
        channels_after=_channels_left(task.model, task.units, removed),
        params=[task.cost.params, params],
        macs=[task.cost.macs, macs],
        scores=decision.scores,
        uncompensated=[])
    if task.options.dry_run:
        return result
    result.uncompensated = decision.uncompensated
    if result.uncompensated is None:
        task.options.progress('compensating', 0, 1)
        result.uncompensated = task.compensator()(removed)
        task.options.progress('compensating', 1, 1)
    _remove_and_verify(task, removed)
    return result


def _remove_and_verify(task: PruningTask, removed: Dict[str, Tensor]) -> None:
    """Remove channels; the model must compute what it does without them."""
    model, progress = task.model, task.options.progress
    with channels_off(model, task.units, removed):
        expected = raw_predictions(model, task.shape)
    progress('removing channels', 0, 2)
    remove_channels(model, task.units, removed)
    progress('removing channels', 1, 2)
    try:
        found = raw_predictions(model, task.shape)
    except Exception as error:  # whatever the model raises
        raise PruningError(f'the pruned model does not run, and has been restored: {error}. Does '
                           'a forward of it depend on channel counts in a way that mmgcp does '
                           'not know? See register_attribute_rule in '
                           'mmgcp/pruning/attributes.py') from error
    check_same_predictions(expected, found)
    progress('removing channels', 2, 2)


def _channels_left(model: nn.Module, units: Iterable[ChannelUnit],
                   removed: Dict[str, Tensor]) -> ChannelTable:
    """The channels of all layers after pruning."""
    left: Dict[str, List[int]] = count_channels(model)
    for (name, side), channels in gather_channels(units, removed).items():
        sides = [0, -1] if is_depthwise(find_layer(model, name)) else [0 if side == 'in' else -1]
        for index in sides:
            left[name][index] -= len(channels)
    return left

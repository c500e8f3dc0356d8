# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Keeping weight decay away from scale factors that have a penalty of their own."""
from typing import Any, List, Sequence, Set

import torch
from torch import nn

from mmgcp.compatibility import register_step_post_hook, register_step_pre_hook


def remove_weight_decay(optimizer: torch.optim.Optimizer, chosen: Set[int]) -> List[Any]:
    """Let an optimizer make its steps without weight decay for some parameters.

    During each step they are in parameter groups of their own, whose weight decay is 0. So it
    does not matter how the optimizer applies it, the result is that of training without, bit
    for bit, and between the steps (for schedulers, logs and checkpoints) the groups are as
    they were.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        chosen (Set[int]): The ids of the parameters.

    Returns:
        list: Handles with a ``remove()``; empty if it is not known how the optimizer
        steps, and it has been left alone.
    """
    if not _is_known(optimizer):
        return []
    groups = _Groups(chosen)
    return [groups, register_step_pre_hook(optimizer, groups.split),
            register_step_post_hook(optimizer, groups.restore)]


class _Groups:
    """The parameter groups, taken apart during a step."""

    def __init__(self, chosen: Set[int]) -> None:
        self.chosen = chosen
        self._optimizer = None
        self._originals: list = []

    def split(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin a step."""
        self.remove()
        groups = []
        for group in optimizer.param_groups:
            spared = [p for p in group['params'] if id(p) in self.chosen]
            if not group.get('weight_decay') or not spared:
                groups.append(group)
                continue
            others = [p for p in group['params'] if id(p) not in self.chosen]
            groups += [dict(group, params=others)] if others else []
            groups.append(dict(group, params=spared, weight_decay=0.))
        self._optimizer, self._originals = optimizer, optimizer.param_groups
        optimizer.param_groups = groups

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """End a step."""
        self.remove()

    def remove(self) -> None:
        """Restore the groups of a step that was broken off, if any."""
        if self._optimizer is not None:
            self._optimizer.param_groups = self._originals
            self._optimizer = None


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step does what one of torch's own optimizers does in it."""
    return type(optimizer).step.__module__.startswith('torch.optim.')


def describe_weight_decay(optimizers: Sequence[torch.optim.Optimizer],
                          gammas: Sequence[nn.Parameter], remove: bool) -> str:
    """Say in a line what is done about the weight decay of some scale factors."""
    chosen = {id(gamma) for gamma in gammas}
    parts = []
    for optimizer in optimizers:
        decayed = sum(id(p) in chosen for group in optimizer.param_groups
                      if group.get('weight_decay') for p in group['params'])
        if not decayed:
            continue
        kind = type(optimizer).__name__
        if not remove:
            parts.append(f'{decayed} have weight decay of {kind}, which is kept')
        elif _is_known(optimizer):
            parts.append(f'{decayed} would have weight decay of {kind}, which is removed')
        else:
            parts.append(f'{decayed} have weight decay of {kind}, which is left, as it is not '
                         'known how it is applied')
    found = '; '.join(parts) or 'none has weight decay'
    return f'Sparsity: of the scale factors of {len(gammas)} BatchNorm layers {found}.'

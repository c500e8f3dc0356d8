# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Optimizer steps without weight decay for scale factors that have a penalty of their own."""
from typing import Any, List, Sequence, Set

import torch
from torch import nn

from mmgcp.compatibility import register_step_post_hook, register_step_pre_hook


def remove_weight_decay(optimizer: torch.optim.Optimizer, chosen: Set[int]) -> List[Any]:
    """Let an optimizer make its steps without weight decay for some parameters.

    During each step, these parameters are in groups of their own with a weight decay of 0.
    However the optimizer applies weight decay, the result is bit for bit that of training
    without it. Between the steps (for schedulers, logs and checkpoints) the groups are as
    they were.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        chosen (Set[int]): The ids of the parameters.

    Returns:
        list: Handles with a ``remove()``. Empty if the optimizer is not one of torch's own:
        how it makes a step is unknown then, and it is left as it is.
    """
    if not _is_known(optimizer):
        return []
    groups = _SplitGroups(chosen)
    return [groups, register_step_pre_hook(optimizer, groups.split),
            register_step_post_hook(optimizer, groups.restore)]


class _SplitGroups:
    """The parameter groups of an optimizer, split during a step."""

    def __init__(self, chosen: Set[int]) -> None:
        self.chosen = chosen
        self._optimizer = None
        self._originals: list = []

    def split(self, optimizer: torch.optim.Optimizer) -> None:
        """Split the groups at the beginning of a step."""
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
        """Restore the groups at the end of a step."""
        self.remove()

    def remove(self) -> None:
        """Restore the groups, also after a step that was interrupted by an error."""
        if self._optimizer is not None:
            self._optimizer.param_groups = self._originals
            self._optimizer = None


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's step is that of one of torch's own optimizers."""
    return type(optimizer).step.__module__.startswith('torch.optim.')


def describe_weight_decay(optimizers: Sequence[torch.optim.Optimizer],
                          gammas: Sequence[nn.Parameter], remove: bool) -> str:
    """Say in one line what happens to the weight decay of some scale factors.

    Args:
        optimizers (Sequence[torch.optim.Optimizer]): The optimizers.
        gammas (Sequence[nn.Parameter]): The scale factors, one parameter per layer.
        remove (bool): Whether their weight decay is to be removed.

    Returns:
        str: The line.
    """
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
            parts.append(f'{decayed} have weight decay of {kind}, which is kept, as it is '
                         'unknown how this optimizer applies it')
    found = '; '.join(parts) or 'none has weight decay'
    return f'Sparsity: of the scale factors of {len(gammas)} BatchNorm layers {found}.'

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How the penalty changes gradients or scale factors when the optimizer makes a step."""
from typing import List, Set, Tuple, Union

import torch
from torch import Tensor, nn

from .channels import Channels

Rates = Union[float, Tensor]


def add_subgradient(channels: Channels, rates: Rates, owned: Set[int],
                    optimizer: torch.optim.Optimizer) -> None:
    """Add the subgradient of the penalty to the gradients, before the step.

    Network slimming (https://arxiv.org/abs/1708.06519).

    Args:
        channels (Channels): The channels.
        rates (float | Tensor): Their sparsity rates (n, ).
        owned (Set[int]): The ids of the scale factors that belong to this optimizer.
        optimizer (torch.optim.Optimizer): The optimizer.
    """
    values = channels.values()
    penalty = rates * channels.directions(values, channels.magnitudes(values))
    # Fused optimizers divide the gradients by the loss scale within their step.
    if getattr(optimizer, '_step_supports_amp_scaling', False):
        scale = getattr(optimizer, 'grad_scale', None)
        penalty = penalty if scale is None else penalty * scale
    pairs = _owned_pairs(channels.gammas, channels.split(penalty), owned)
    if pairs:
        gammas, parts = map(list, zip(*pairs))
        torch._foreach_add_([gamma.grad for gamma in gammas], parts)


@torch.no_grad()
def shrink(channels: Channels, rates: Rates, owned: Set[int],
           optimizer: torch.optim.Optimizer) -> None:
    """Apply the proximal operator of the penalty, after the step.

    Soft thresholding by lr * rate (ISTA, https://epubs.siam.org/doi/10.1137/080716542,
    equation 1.5); for coupled channels, of their norm (https://arxiv.org/abs/1108.0775,
    section 3.3).

    Args:
        channels (Channels): The channels.
        rates (float | Tensor): Their sparsity rates (n, ).
        owned (Set[int]): The ids of the scale factors that belong to this optimizer.
        optimizer (torch.optim.Optimizer): The optimizer.
    """
    learning_rates = {id(p): float(group['lr']) for group in optimizer.param_groups
                      for p in group['params'] if id(p) in owned}
    steps = channels.spread([learning_rates.get(id(gamma), 0.) for gamma in channels.gammas])
    values = channels.values()
    magnitudes = channels.magnitudes(values)
    shrunk = channels.directions(values, magnitudes) * (magnitudes - steps * rates).clamp(min=0)
    pairs = _owned_pairs(channels.gammas, channels.split_with_others(shrunk), owned)
    if pairs:
        # In place, because MMYOLO's ExpMomentumEMA keeps references to the tensors. Adding to
        # zeros takes two kernels, and unlike _foreach_copy_ every supported torch has them.
        gammas, parts = map(list, zip(*pairs))
        torch._foreach_zero_(gammas)
        torch._foreach_add_(gammas, parts)


def has_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a fused optimizer skipped its step because of infinite gradients."""
    found_inf = getattr(optimizer, 'found_inf', None)
    return found_inf is not None and bool(found_inf)


def _owned_pairs(gammas: List[nn.Parameter], parts: List[Tensor],
                 owned: Set[int]) -> List[Tuple[nn.Parameter, Tensor]]:
    """The scale factors that this optimizer updates, each with its part of a vector."""
    return [(gamma, part) for gamma, part in zip(gammas, parts)
            if gamma.grad is not None and id(gamma) in owned]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Stochastic gradient descent on gradients that are nowhere kept."""
from typing import Optional, Sequence

import torch
from torch import Tensor

# Longer gradients are shortened to this norm
LARGEST_NORM = 10.


class SGD:
    """SGD with momentum, of gradients of limited norm; the parameters' ``grad`` stays as it is.

    Args:
        params (Sequence[Tensor]): The parameters, changed in place.
        lr (float): Learning rate.
        momentum (float): Momentum.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float):
        self.params = list(params)
        self.lr = lr
        self.momentum = momentum
        self._velocities = [torch.zeros_like(param) for param in self.params]

    @torch.no_grad()
    def step(self, gradients: Sequence[Optional[Tensor]]) -> None:
        """Take a step; parameters whose gradient is None stay.

        Args:
            gradients (Sequence[Tensor | None]): The gradient of each parameter. If their norm,
                all together, is above 10, they are shortened to that.
        """
        norms = [gradient.norm() for gradient in gradients if gradient is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.
        scale = min(1., LARGEST_NORM / max(norm, 1e-12))
        for param, velocity, gradient in zip(self.params, self._velocities, gradients):
            if gradient is not None:
                velocity.mul_(self.momentum).add_(gradient, alpha=scale)
                param.sub_(velocity, alpha=self.lr)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Steps of optimizers with clipped gradients, which leave no gradients behind."""
from contextlib import contextmanager
from typing import Iterable, Iterator

import torch.nn as nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

LARGEST_NORM = 10.


@contextmanager
def gradients_kept(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Put the gradients of parameters aside, and give them back at the end.

    Args:
        params (Iterable[nn.Parameter]): The parameters. Meanwhile they begin without gradients.
    """
    before = [(param, param.grad) for param in params]
    try:
        for param, _ in before:
            param.grad = None
        yield
    finally:
        for param, grad in before:
            param.grad = grad


def clipped_step(optimizer: Optimizer) -> None:
    """Take a step and clear the gradients.

    Args:
        optimizer (Optimizer): The gradients of each of its groups of parameters are clipped to a
            norm of 10 first. Parameters without a gradient stay.
    """
    for group in optimizer.param_groups:
        clip_grad_norm_(group['params'], LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running a detector on an image of noise."""
from typing import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor


def random_image(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """Make an image of noise, the same at every call.

    Args:
        model (nn.Module): Says the device and the precision.
        shape (Sequence[int]): Shape (C, H, W) in pixels.

    Returns:
        Tensor: A batch (1, C, H, W) with values in [0, 1).
    """
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    return image.to(next(model.parameters()))


@torch.no_grad()
def run_with_hooks(model: nn.Module, shape: Sequence[int], handles: Iterable) -> None:
    """Run a detector once in eval mode, then remove hooks and restore the modes.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``.
        shape (Sequence[int]): Shape (C, H, W) of the image in pixels.
        handles (Iterable): Handles of the hooks that look at the run.
    """
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        model(random_image(model, shape), mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode

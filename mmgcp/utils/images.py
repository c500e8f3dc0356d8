# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Sequence

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

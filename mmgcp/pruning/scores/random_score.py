# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import zlib
from typing import Dict

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.pruning.units import ChannelUnit
from mmgcp.registry import TASK_UTILS

from .base import Criterion


@TASK_UTILS.register_module()
class Random(Criterion):
    """Random scores, uniform in [0, 1): what other criteria have to be better than.

    They depend on the seed, the name of the channel unit and its number of channels alone.

    Args:
        seed (int): Seed. Defaults to 0.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return a row (C, ) for a unit of size C, by its name."""
        seed = zlib.crc32(f'{self.seed} {unit.name}'.encode())
        generator = torch.Generator().manual_seed(seed)
        return {unit.name: torch.rand(unit.size, generator=generator)}

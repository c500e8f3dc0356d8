# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import zlib
from typing import Dict

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.registry import TASK_UTILS

from ..structures import CoupledChannels
from .criterion import Criterion


@TASK_UTILS.register_module()
class Random(Criterion):
    """Random scores, uniform in [0, 1): what other criteria have to be better than.

    They depend on the seed, the name of the coupled set and its number of channels alone.

    Args:
        seed (int): Seed. Defaults to 0.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, model: nn.Module, coupled: CoupledChannels) -> Dict[str, Tensor]:
        """Return a row (C, ) for a set of size C, by its name."""
        seed = zlib.crc32(f'{self.seed} {coupled.name}'.encode())
        generator = torch.Generator().manual_seed(seed)
        return {coupled.name: torch.rand(coupled.size, generator=generator)}

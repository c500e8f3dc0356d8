# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How strongly each channel's scale factor is pulled to zero in the course of training.

A schedule has one method, ``rates(magnitudes, rate, progress)``. ``magnitudes`` holds |gamma|
of all channels in one dimension, ``rate`` the configured sparsity rate and ``progress`` the
share of the training that is done, in [0, 1). It returns one rate for all channels or a
tensor with a rate for each.
"""
import math
from typing import Union

import torch
from torch import Tensor

from mmgcp.registry import TASK_UTILS


@TASK_UTILS.register_module(name=['constant', 'ConstantSchedule'])
class ConstantSchedule:
    """The same rate for every channel, always.

    That is network slimming (https://arxiv.org/abs/1708.06519).
    """

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> float:
        """Return ``rate``."""
        return rate


@TASK_UTILS.register_module(name=['two_phase', 'TwoPhaseSchedule'])
class TwoPhaseSchedule:
    """First press all channels, then only those that are small.

    The dynamic sparse training of GCP-SAD (https://arxiv.org/abs/2306.01526), as in its
    authors' code: in the second phase a channel whose |gamma| reaches a percentile over all
    layers is going to be kept, so it is hardly shrunk any more.

    Args:
        begin (float): Share of the training after which the second phase begins.
            Defaults to 0.4.
        percentile (float): Share of the channels that go on being pressed. A channel is
            spared if its |gamma| is at or above ``numpy.percentile(|gamma|, 100 * percentile)``
            of the moment. Defaults to 0.65.
        kept_factor (float): Factor on the rate of the spared channels. Defaults to 0.01.
    """

    def __init__(self,
                 begin: float = 0.4,
                 percentile: float = 0.65,
                 kept_factor: float = 0.01) -> None:
        for name, value in dict(begin=begin, percentile=percentile).items():
            if not 0 <= value <= 1:
                raise ValueError(f'{name} must be in [0, 1], but got {value}.')
        if not kept_factor >= 0:
            raise ValueError(f'kept_factor must not be negative, but got {kept_factor}.')
        self.begin = begin
        self.percentile = percentile
        self.kept_factor = kept_factor

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> Union[float, Tensor]:
        """Return ``rate``, in the second phase less of it for the large channels."""
        if progress < self.begin:
            return rate
        # The interpolated percentile lies above the element before this one, so that
        # comparing with this one spares the same channels. Unlike kthvalue, sort is
        # deterministic on CUDA.
        position = math.ceil(self.percentile * (magnitudes.numel() - 1))
        threshold = magnitudes.sort().values[position]
        pressed = torch.full_like(magnitudes, rate)
        return torch.where(magnitudes >= threshold, pressed * self.kept_factor, pressed)

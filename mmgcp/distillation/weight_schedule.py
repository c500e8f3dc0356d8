# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import math
from typing import Optional

from mmengine.logging import MessageHub

from mmgcp.errors import UserError
from mmgcp.utils.checks import (
    COUNT,
    MAPPING,
    SHARE,
    check_keys,
    check_value,
    checked,
    number_in,
    one_of,
)

DECAYS = ('none', 'linear', 'cosine')


class WeightSchedule:
    """The factor on the weights of the distillation in the course of the training.

    During the warm-up it rises linearly from 0 to 1. From then on it stays at 1, or falls to
    ``final_factor``, which it reaches at the stop epoch or otherwise at the end of the
    training. The progress is the Runner's, so that it is right after resuming.

    Args:
        warmup (float): Length of the warm-up in epochs or, if below 1, as a share of the
            whole training. Defaults to 0.
        decay (str): 'none', 'linear' or 'cosine' (half a wave). Defaults to 'none'.
        final_factor (float): The factor at the end of the decay. Defaults to 0.
        stop_epoch (int, optional): Number of epochs after which the distillation stops.
            Defaults to None.

    Raises:
        UserError: A setting is out of its range.
    """

    @checked(warmup=number_in(0, 1e6), decay=one_of(*DECAYS), final_factor=SHARE,
             stop_epoch=COUNT)
    def __init__(self,
                 warmup: float = 0,
                 decay: str = 'none',
                 final_factor: float = 0.,
                 stop_epoch: Optional[int] = None):
        if stop_epoch is not None and warmup >= max(stop_epoch, 1):
            raise UserError(f'the warmup of {warmup} epochs must end before the stop_epoch '
                            f'{stop_epoch}')
        self.warmup = warmup
        self.decay = decay
        self.final_factor = final_factor
        self.stop_epoch = stop_epoch

    def current_factor(self) -> Optional[float]:
        """Return the factor at the current iteration; see :meth:`factor_at`.

        Raises a RuntimeError if it depends on the progress of a Runner, but there is none.
        """
        if not self.warmup and self.decay == 'none' and self.stop_epoch is None:
            return 1.
        hub = MessageHub.get_current_instance()
        progress = [hub.runtime_info.get(name) for name in ('iter', 'max_iters', 'max_epochs')]
        if None in progress:
            raise RuntimeError("the schedule of the distillation needs MMEngine's Runner, which "
                               'knows the progress of the training')
        return self.factor_at(*progress)

    def factor_at(self, iteration: int, max_iters: int, max_epochs: int) -> Optional[float]:
        """Return the factor after so many iterations of all, None from the stop epoch on."""
        epoch_iters = max_iters / max_epochs
        end = max_iters if self.stop_epoch is None else self.stop_epoch * epoch_iters
        if self.stop_epoch is not None and iteration >= end:
            return None
        warmup_iters = self.warmup * (max_iters if self.warmup < 1 else epoch_iters)
        if iteration < warmup_iters:
            return iteration / warmup_iters
        if self.decay == 'none':
            return 1.
        progress = min((iteration - warmup_iters) / max(end - warmup_iters, 1), 1.)
        left = 1 - progress if self.decay == 'linear' else (1 + math.cos(math.pi * progress)) / 2
        return self.final_factor + (1 - self.final_factor) * left


def build_schedule(config: dict) -> WeightSchedule:
    """Build a :class:`WeightSchedule` from its arguments; unknown ones raise a UserError."""
    check_value('schedule', config, MAPPING)
    check_keys(config, ['warmup', 'decay', 'final_factor', 'stop_epoch'], 'schedule')
    return WeightSchedule(**config)

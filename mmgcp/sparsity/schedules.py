# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How strongly each channel's scale factor is pulled to zero in the course of training.

A schedule has the method ``rates(magnitudes, rate, progress)``. ``magnitudes`` holds |gamma|
of all channels in one dimension, ``rate`` the configured sparsity rate and ``progress`` the
share of the training that is done, in [0, 1). It returns one rate for all channels or a
tensor with a rate for each, and changes nothing: it is called for the logs, too.

A schedule with a state has three methods more: ``update(near_zero, progress)``, called once
after each step of the optimizer with the share of near-zero channels, and ``state_dict()`` and
``load_state_dict(state)``, by which the state is kept in checkpoints.
"""
import math
from typing import Dict, Optional, Sequence, Union

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
        _check_shares(begin=begin, percentile=percentile)
        _check_not_negative(kept_factor=kept_factor)
        self.begin = begin
        self.percentile = percentile
        self.kept_factor = kept_factor

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> Union[float, Tensor]:
        """Return ``rate``, in the second phase less of it for the large channels."""
        if progress < self.begin:
            return rate
        return _press_small(magnitudes, self.percentile, rate, rate * self.kept_factor)


@TASK_UTILS.register_module(name=['linear', 'LinearSchedule'])
class LinearSchedule:
    """A rate that goes from one multiple of the configured one to another.

    Args:
        start (float): Factor on the rate until ``begin``. Defaults to 0.
        stop (float): Factor on the rate from ``end`` on. Defaults to 1.
        begin (float): Share of the training after which the change begins. Defaults to 0.
        end (float): Share of the training after which it is complete. Defaults to 1.
    """

    def __init__(self,
                 start: float = 0.,
                 stop: float = 1.,
                 begin: float = 0.,
                 end: float = 1.) -> None:
        _check_not_negative(start=start, stop=stop)
        _check_shares(begin=begin, end=end)
        if begin >= end:
            raise ValueError(f'begin must be below end, but got {begin} and {end}.')
        self.start = start
        self.stop = stop
        self.begin = begin
        self.end = end

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> float:
        """Return the same multiple of ``rate`` for all channels."""
        done = min(max((progress - self.begin) / (self.end - self.begin), 0.), 1.)
        return rate * (self.start + (self.stop - self.start) * self._ease(done))

    def _ease(self, done: float) -> float:
        return done


@TASK_UTILS.register_module(name=['cosine', 'CosineSchedule'])
class CosineSchedule(LinearSchedule):
    """Half a cosine instead of the straight line; see :class:`LinearSchedule`."""

    def _ease(self, done: float) -> float:
        return (1 - math.cos(math.pi * done)) / 2


@TASK_UTILS.register_module(name=['step', 'StepSchedule'])
class StepSchedule:
    """A rate that is multiplied by a factor at some points of the training.

    Args:
        milestones (Sequence[float]): These points, as shares of the training, ascending.
            Defaults to (0.5, 0.75).
        factor (float): The factor. Defaults to 0.1.
    """

    def __init__(self, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> None:
        for milestone in milestones:
            _check_shares(milestones=milestone)
        if list(milestones) != sorted(milestones):
            raise ValueError(f'milestones must ascend, but got {milestones}.')
        _check_not_negative(factor=factor)
        self.milestones = tuple(milestones)
        self.factor = factor

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> float:
        """Return the same multiple of ``rate`` for all channels."""
        passed = sum(progress >= milestone for milestone in self.milestones)
        return rate * self.factor**passed


@TASK_UTILS.register_module(name=['feedback', 'FeedbackSchedule'])
class FeedbackSchedule:
    r"""Steer the rate so that a wanted share of the channels is near zero.

    An integral controller. The rate is multiplied by :math:`e^u`; u is 0 in the beginning and
    after each step of the optimizer becomes

    .. math::
        u \leftarrow clip(u + strength \cdot (wanted - near\_zero) \cdot \Delta progress,
                          \log min\_factor, \log max\_factor)

    with ``near_zero`` the measured share, ``wanted`` rising from 0 to ``target`` in proportion
    to the progress of the training, and :math:`\Delta progress` the progress since the step
    before. A deviation of 0.1 that lasts for a tenth of the training thus changes u by
    0.01 strength, however many iterations that takes. Clipping u itself, not just what is made
    of it, keeps the integral from winding up while the rate is at a bound.

    Where all scale factors are alike, as in a new network, they would reach zero at about the
    same time, and no controller could stop half of them. So the channels that are to be kept
    are spared as in the second phase of :class:`TwoPhaseSchedule`, with ``target`` for the
    percentile; theirs is not steered upwards.

    Best with ``penalty='proximal'``. Subgradient steps make scale factors swing around zero by
    up to lr * rate / (1 - momentum); where that is more than ``near_zero_thr``, a higher rate
    means fewer near zero, and the controller fails. Keep rate * max_factor below that.

    Args:
        target (float): The wanted share of near-zero channels.
        ramp (float): Share of the training after which all of the target is wanted.
            Defaults to 0.5.
        strength (float): How fast the rate reacts. Defaults to 50.
        min_factor (float): Least factor on the rate. Defaults to 0.01.
        max_factor (float): Largest factor on the rate. Defaults to 10.
        kept_factor (float): Factor on the rate of the spared channels. Defaults to 0.01.
    """

    def __init__(self,
                 target: float,
                 ramp: float = 0.5,
                 strength: float = 50.,
                 min_factor: float = 0.01,
                 max_factor: float = 10.,
                 kept_factor: float = 0.01) -> None:
        _check_shares(target=target, ramp=ramp)
        _check_not_negative(strength=strength, kept_factor=kept_factor)
        if not 0 < min_factor <= 1 <= max_factor < math.inf:
            raise ValueError('min_factor must be in (0, 1] and max_factor at least 1, but got '
                             f'{min_factor} and {max_factor}.')
        self.target = target
        self.ramp = ramp
        self.strength = strength
        self.bounds = math.log(min_factor), math.log(max_factor)
        self.kept_factor = kept_factor
        self._log_factor = 0.
        self._progress: Optional[float] = None

    def wanted(self, progress: float) -> float:
        """The share of near-zero channels that is wanted at a point of the training."""
        return self.target if progress >= self.ramp else self.target * progress / self.ramp

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> Tensor:
        """Return a multiple of ``rate``, and less for the large channels."""
        steered = rate * math.exp(self._log_factor)
        return _press_small(magnitudes, self.target, steered, min(rate, steered) * self.kept_factor)

    def update(self, near_zero: float, progress: float) -> None:
        """Move the rate by what the share of near-zero channels deviates."""
        if self._progress is not None:
            change = self.strength * (self.wanted(progress) - near_zero)
            moved = self._log_factor + change * (progress - self._progress)
            self._log_factor = min(max(moved, self.bounds[0]), self.bounds[1])
        self._progress = progress

    def state_dict(self) -> Dict[str, Optional[float]]:
        """The state, for a checkpoint."""
        return dict(log_factor=self._log_factor, progress=self._progress)

    def load_state_dict(self, state: Dict[str, Optional[float]]) -> None:
        """Take over the state of a checkpoint."""
        self._log_factor = state['log_factor']
        self._progress = state['progress']


def _press_small(magnitudes: Tensor, share: float, rate: float, kept_rate: float) -> Tensor:
    """A rate for a share of the channels, the small ones, and another for those kept."""
    # The interpolated percentile lies above the element before this one, so that
    # comparing with this one spares the same channels. Unlike kthvalue, sort is
    # deterministic on CUDA.
    position = math.ceil(share * (magnitudes.numel() - 1))
    threshold = magnitudes.sort().values[position]
    return torch.where(magnitudes >= threshold, torch.full_like(magnitudes, kept_rate),
                       torch.full_like(magnitudes, rate))


def _check_shares(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f'{name} must be in [0, 1], but got {value}.')


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f'{name} must be finite and not negative, but got {value}.')

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How strongly the scale factor of each channel is shrunk in the course of the training.

A schedule has a method ``rates(magnitudes, rate, progress)``. ``magnitudes`` (n, ) holds the
absolute scale factor of each channel, ``rate`` is the configured sparsity rate and ``progress``
the share of the training that is done, in [0, 1). The method returns one rate for all channels
or a tensor (n, ) of rates, and has no side effects: it is also called for the logs.

A schedule with a state has three more methods: ``update(near_zero, progress)``, which is called
once after each step of the optimizer with the share of near-zero channels, and ``state_dict()``
and ``load_state_dict(state)``, with which checkpoints keep the state.
"""
import math
from typing import Any, Dict, Optional, Sequence, Union

import torch
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import TASK_UTILS, build_part
from mmgcp.utils.checks import SHARE, checked, list_of, number_in

FACTOR = number_in(0, 1e6)


@TASK_UTILS.register_module(name=['constant', 'ConstantSchedule'])
class ConstantSchedule:
    """The same rate for all channels at all times, as in https://arxiv.org/abs/1708.06519."""

    @checked()
    def __init__(self) -> None:
        pass

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> float:
        """Return ``rate``."""
        return rate


@TASK_UTILS.register_module(name=['two_phase', 'TwoPhaseSchedule'])
class TwoPhaseSchedule:
    """First shrink all channels, then only the small ones.

    This is the dynamic sparse training of GCP-SAD (https://arxiv.org/abs/2306.01526), as in
    the authors' code: in the second phase, a channel whose |gamma| reaches a percentile over
    all layers counts as one to be kept, and is hardly shrunk any more.

    Args:
        begin (float): Share of the training after which the second phase begins.
            Defaults to 0.4.
        percentile (float): Share of the channels that are still shrunk. A channel is spared
            if its |gamma| is at or above the current ``numpy.percentile(|gamma|,
            100 * percentile)``. Defaults to 0.65.
        kept_factor (float): Factor on the rate of the spared channels. Defaults to 0.01.

    Raises:
        UserError: A setting is out of its range.
    """

    @checked(begin=SHARE, percentile=SHARE, kept_factor=FACTOR)
    def __init__(self,
                 begin: float = 0.4,
                 percentile: float = 0.65,
                 kept_factor: float = 0.01) -> None:
        self.begin = begin
        self.percentile = percentile
        self.kept_factor = kept_factor

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> Union[float, Tensor]:
        """Return ``rate``, and in the second phase less for the large channels."""
        if progress < self.begin:
            return rate
        return _shrink_small(magnitudes, self.percentile, rate, rate * self.kept_factor)


@TASK_UTILS.register_module(name=['linear', 'LinearSchedule'])
class LinearSchedule:
    """A rate that changes linearly from one multiple of the configured rate to another.

    Args:
        start (float): Factor on the rate until ``begin``. Defaults to 0.
        stop (float): Factor on the rate from ``end`` on. Defaults to 1.
        begin (float): Share of the training after which the change begins. Defaults to 0.
        end (float): Share of the training after which it is complete. Defaults to 1.

    Raises:
        UserError: A setting is out of its range.
    """

    @checked(start=FACTOR, stop=FACTOR, begin=SHARE, end=SHARE)
    def __init__(self,
                 start: float = 0.,
                 stop: float = 1.,
                 begin: float = 0.,
                 end: float = 1.) -> None:
        if begin >= end:
            raise UserError(f'begin must be below end, but they are {begin} and {end}')
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
    """A rate that changes along half a cosine wave; see :class:`LinearSchedule`."""

    def _ease(self, done: float) -> float:
        return (1 - math.cos(math.pi * done)) / 2


@TASK_UTILS.register_module(name=['step', 'StepSchedule'])
class StepSchedule:
    """A rate that is multiplied by a factor at some points of the training.

    Args:
        milestones (Sequence[float]): These points as shares of the training, in ascending
            order. Defaults to (0.5, 0.75).
        factor (float): The factor. Defaults to 0.1.

    Raises:
        UserError: A setting is out of its range.
    """

    @checked(milestones=list_of(SHARE, 'must be a list of numbers in [0, 1]', empty=True),
             factor=FACTOR)
    def __init__(self, milestones: Sequence[float] = (0.5, 0.75), factor: float = 0.1) -> None:
        if list(milestones) != sorted(milestones):
            raise UserError(f'milestones must be in ascending order, but they are {milestones}')
        self.milestones = tuple(milestones)
        self.factor = factor

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> float:
        """Return the same multiple of ``rate`` for all channels."""
        passed = sum(progress >= milestone for milestone in self.milestones)
        return rate * self.factor**passed


@TASK_UTILS.register_module(name=['feedback', 'FeedbackSchedule'])
class FeedbackSchedule:
    r"""Control the rate so that a target share of the channels gets near zero.

    This is an integral controller. The rate is multiplied by :math:`e^u`, where u is 0 at first
    and after each step of the optimizer becomes

    .. math::
        u \leftarrow clip(u + strength \cdot (wanted - near\_zero) \cdot \Delta progress,
                          \log min\_factor, \log max\_factor)

    Here ``near_zero`` is the measured share, ``wanted`` rises from 0 to ``target`` in proportion
    to the progress of the training, and :math:`\Delta progress` is the progress since the last
    step. So a deviation of 0.1 that lasts for a tenth of the training changes u by
    0.01 strength, however many iterations that takes. Clipping u rather than the factor
    prevents integral windup while the rate is at a bound.

    If all scale factors are alike, as in a new network, they would all reach zero at about the
    same time, and no controller could stop half of them. Therefore the channels that are to be
    kept are spared as in the second phase of :class:`TwoPhaseSchedule`, with ``target`` as the
    percentile, and their rate is never raised.

    It works best with ``penalty='proximal'``. With subgradient steps, scale factors oscillate
    around zero by up to lr * rate / (1 - momentum). If that exceeds ``near_zero_thr``, a higher
    rate leaves fewer channels near zero, and the controller fails: choose rate * max_factor
    small enough.

    Args:
        target (float): The target share of near-zero channels.
        ramp (float): Share of the training after which the whole target is wanted.
            Defaults to 0.5.
        strength (float): How fast the rate reacts. Defaults to 50.
        min_factor (float): Smallest factor on the rate. Defaults to 0.01.
        max_factor (float): Largest factor on the rate. Defaults to 10.
        kept_factor (float): Factor on the rate of the spared channels. Defaults to 0.01.

    Raises:
        UserError: A setting is out of its range.
    """

    @checked(target=SHARE, ramp=SHARE, strength=FACTOR, kept_factor=FACTOR,
             min_factor=number_in(0, 1, open_low=True), max_factor=number_in(1, 1e6))
    def __init__(self,
                 target: float,
                 ramp: float = 0.5,
                 strength: float = 50.,
                 min_factor: float = 0.01,
                 max_factor: float = 10.,
                 kept_factor: float = 0.01) -> None:
        self.target = target
        self.ramp = ramp
        self.strength = strength
        self.bounds = math.log(min_factor), math.log(max_factor)
        self.kept_factor = kept_factor
        self._log_factor = 0.
        self._progress: Optional[float] = None

    def wanted(self, progress: float) -> float:
        """Return the share of near-zero channels that is wanted at a point of the training."""
        return self.target if progress >= self.ramp else self.target * progress / self.ramp

    def rates(self, magnitudes: Tensor, rate: float, progress: float) -> Tensor:
        """Return a multiple of ``rate``, and less for the large channels."""
        controlled = rate * math.exp(self._log_factor)
        kept_rate = min(rate, controlled) * self.kept_factor
        return _shrink_small(magnitudes, self.target, controlled, kept_rate)

    def update(self, near_zero: float, progress: float) -> None:
        """Adjust the rate to the deviation of the share of near-zero channels."""
        if self._progress is not None:
            change = self.strength * (self.wanted(progress) - near_zero)
            moved = self._log_factor + change * (progress - self._progress)
            self._log_factor = min(max(moved, self.bounds[0]), self.bounds[1])
        self._progress = progress

    def state_dict(self) -> Dict[str, Optional[float]]:
        """Return the state, for a checkpoint."""
        return dict(log_factor=self._log_factor, progress=self._progress)

    def load_state_dict(self, state: Dict[str, Optional[float]]) -> None:
        """Load the state of a checkpoint."""
        self._log_factor = state['log_factor']
        self._progress = state['progress']


def _shrink_small(magnitudes: Tensor, share: float, rate: float, kept_rate: float) -> Tensor:
    """One rate for the given share of the channels, the smallest ones, and one for the others."""
    # numpy.percentile interpolates between the element before this one and this one, so that
    # comparing with this one spares the same channels. Unlike kthvalue, sort is
    # deterministic on CUDA.
    position = math.ceil(share * (magnitudes.numel() - 1))
    threshold = magnitudes.sort().values[position]
    return torch.where(magnitudes >= threshold, torch.full_like(magnitudes, kept_rate),
                       torch.full_like(magnitudes, rate))


def build_schedule(config: dict) -> Any:
    """Build a schedule from its config; a UserError says what is wrong with it."""
    # With the scope, because a bare name would be looked up in the default scope
    return build_part(TASK_UTILS, dict(config, _scope_='mmgcp'), 'sparsity schedule',
                      lambda kind: callable(getattr(kind, 'rates', None)))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Recovery without labels: a pruned model learns to do on images what the original does."""
import math
import sys
import time
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import average_gradients, from_first_rank, total_over_ranks
from mmgcp.nn.precision import full_precision
from mmgcp.nn.temporarily import eval_mode, only_values_change, requiring_grad, restored_on_error
from mmgcp.pruning.surgery import Channels
from mmgcp.utils.checks import Check, check_value, number_in

from .imitation import make_imitation

# Of the first images one in four is held out
FIRST_IMAGES, HELD_OUT_EVERY = 64, 4
MEASURED_AT = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # share of the way
SETBACK = 1 / 3  # factor on the learning rate if the model does worse than before
WARM_UP = 0.05  # share of the steps, or of the time
MAX_GRADIENT = 10.
LEAST_SIZE = 1e-3  # of a tensor; smaller ones move as if they had this size
MINUTES: Check = number_in(0, sys.float_info.max, 'must be a finite number that is not negative')
STEPS: Check = number_in(1, math.inf, 'must be a positive integer', integer=True)
RATE: Check = number_in(0, math.inf, 'must be a positive number', open_low=True)
Progress = Callable[[str, int, int], None]


class Recovered(NamedTuple):
    """What recovery has done: steps, and the difference from the original on held-out images."""
    steps_done: int
    difference_before: float
    difference_after: float


class Recovery:
    """Lets a pruned model follow the original, as the option ``recover`` of ``prune()``.

    Args:
        images (Iterable[Tensor]): See :func:`recover`.
        minutes, steps, lr: See :func:`recover`.
        progress (Callable): See :func:`recover`.
        turns (int): How many times it will be called, as after each step of a pruning; minutes and
            steps are divided among these. Defaults to 1.

    Raises:
        PruningError: A setting is not allowed.
    """

    def __init__(self, images: Iterable[Tensor], minutes: Optional[float] = None,
                 steps: Optional[int] = None, lr: float = 1e-3,
                 progress: Progress = lambda stage, done, steps: None, turns: int = 1):
        check_settings(minutes, steps, lr)
        self._images, self.progress = images, progress
        self.settings = dict(minutes=minutes, steps=steps, lr=lr)
        self._turns = turns
        self._each_turn = dict(minutes=minutes and minutes / turns,
                               steps=steps and max(1, steps // turns), lr=lr)

    def __call__(self, student: nn.Module, teacher: nn.Module,
                 removed: Channels) -> Dict[str, Any]:
        """Train the pruned model in place; return the settings and what was done, for a report."""
        done = recover(student, teacher, self._images, removed=removed, progress=self.progress,
                       **self._each_turn)
        turns = dict(turns=self._turns) if self._turns > 1 else {}
        return dict({name: value for name, value in self.settings.items() if value is not None},
                    **turns, **done._asdict())


def check_settings(minutes: Optional[float], steps: Optional[int], lr: float) -> None:
    """Raise a PruningError if a setting of :func:`recover` is not allowed."""
    if minutes is None and steps is None:
        raise PruningError('recovery needs minutes or steps')
    for name, value, check in (('minutes', minutes, MINUTES), ('steps', steps, STEPS),
                               ('lr', lr, RATE)):
        if value is not None or name == 'lr':
            check_value(f'{name} of the recovery', value, check, PruningError)


@full_precision()
def recover(student: nn.Module, teacher: nn.Module, images: Iterable[Tensor],
            minutes: Optional[float] = None, steps: Optional[int] = None, lr: float = 1e-3,
            removed: Optional[Channels] = None,
            progress: Progress = lambda stage, done, steps: None) -> Recovered:
    """Train a pruned model to emit what the original emits, on images without annotations.

    The objective is that of :func:`mmgcp.pipeline.imitation.make_imitation`. It is measured on
    images that are held out, one in four of the first 64, on the way and in the end, when the
    model gets back its best state, which may be that in which it came. Where it does no better
    than in that one, it gets back its best state at once and goes on with a third of the learning
    rate. BatchNorms keep their running statistics, and dropout is off. Adam's learning rate is
    relative to each tensor, as Adafactor's is (arXiv 1804.04235, section 8); it rises over the
    first 5 % of the way and falls to zero with half a cosine; gradients are clipped to the norm
    10; images are mirrored at random. With a number of steps and no time limit the result is
    always the same.

    Args:
        student (nn.Module): The pruned model, changed in place. Only values of its parameters
            change, those of frozen ones, too; if anything goes wrong, none do.
        teacher (nn.Module): The original, on the same device.
        images (Iterable[Tensor]): Batches (N, C, H, W), gone through again and again. Of several
            processes each has its own, and gradients are averaged.
        minutes (float, optional): Time limit, all in all; 0 for nothing to happen.
        steps (int, optional): Number of steps at most, each with a batch.
        lr (float): Highest learning rate, as a share of the root mean square that a tensor has in
            the beginning. Defaults to 0.001.
        removed (Channels, optional): Channels that the original's layers have lost, by name of
            the layer and side. Without them, only predictions are compared.
        progress (Callable): Called with the name of the stage, how many of the steps, or of the
            seconds, are over, and the number of all.

    Returns:
        Recovered: How many steps there were, and the objective on the images that are held out.

    Raises:
        PruningError: A setting is not allowed, there are no images, or the models do not fit.
    """
    check_settings(minutes, steps, lr)
    if minutes == 0:
        return Recovered(0, math.nan, math.nan)
    way = _Way(minutes, steps, progress)
    images = list(images) if isinstance(images, Iterator) else images
    with restored_on_error(student, weights=True), only_values_change(student), \
            eval_mode(student), eval_mode(teacher), requiring_grad(teacher, ()), \
            requiring_grad(student, student.parameters()), torch.enable_grad():
        held_out = _held_out(images, next(student.parameters()))
        imitation = make_imitation(student, teacher, removed or {}, held_out)
        return _Training(student, imitation, held_out, lr).run(images, way)


class _Way:
    """How far a training is: the larger one of the shares of the time and of the steps."""

    def __init__(self, minutes: Optional[float], steps: Optional[int], progress: Progress):
        self._seconds, self._steps, self._progress = (minutes or math.inf) * 60, steps, progress
        self._start = time.monotonic()
        self.done = 0
        self.share = 0.

    def check(self) -> float:
        """Return the share that is over, at most 1; of several processes the first one knows."""
        seconds = time.monotonic() - self._start
        share = max(seconds / self._seconds, self.done / (self._steps or math.inf))
        self.share = from_first_rank(min(share, 1.))
        total = self._steps or round(self._seconds)
        self._progress('recovering', round(self.share * total), total)
        return self.share

    def step(self) -> None:
        """Count a step."""
        self.done += 1


class _Training:
    """The training of a model, which keeps the model's best state."""

    def __init__(self, student: nn.Module, imitation: Callable[[Tensor], Tensor],
                 held_out: List[Tensor], lr: float):
        self._student, self._imitation, self._lr = student, imitation, lr
        self._held_out = held_out
        self._params = list(student.parameters())
        self._sizes = [float(param.detach().square().mean().sqrt()) for param in self._params]
        self._optimizer = self._new_optimizer()
        self._flips = torch.Generator().manual_seed(0)

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Adam, in which each tensor has a rate of its own."""
        return torch.optim.Adam([dict(params=[param]) for param in self._params])

    def run(self, images: Iterable[Tensor], way: _Way) -> Recovered:
        """Train until the way is over; leave the best state in the model."""
        self._before = self._best = self._measure()
        self._state = self._copy()
        batches, points = _endless(images), list(MEASURED_AT)
        while way.check() < 1:
            if points and way.share >= points[0]:
                points = [point for point in points if point > way.share]
                self._judge()
            self._step(next(batches), way.share)
            way.step()
        self._judge()
        self._put_back()
        return Recovered(way.done, self._before, self._best)

    def _judge(self) -> None:
        """Keep the best state; go back to it from one that is worse than the first."""
        found = self._measure()
        if found < self._best:
            self._best, self._state = found, self._copy()
        elif not found < self._before:  # also if it is not finite
            self._put_back()
            self._lr *= SETBACK
            self._optimizer = self._new_optimizer()

    def _step(self, images: Optional[Tensor], share: float) -> None:
        """Take a step for a batch (N, C, H, W), or only with the gradients of other ranks."""
        for group, size in zip(self._optimizer.param_groups, self._sizes):
            group['lr'] = self._lr * max(size, LEAST_SIZE) * learning_rate(share)
        self._optimizer.zero_grad(set_to_none=True)
        if images is not None:
            mirrored = torch.rand(len(images), generator=self._flips) < 0.5
            images = torch.where(mirrored[:, None, None, None].to(images.device),
                                 images.flip(-1), images)
            self._imitation(images.to(self._params[0])).backward()
        average_gradients(self._params, images is not None)
        norm = nn.utils.clip_grad_norm_(self._params, MAX_GRADIENT)
        if math.isfinite(norm):
            self._optimizer.step()

    @torch.no_grad()
    def _measure(self) -> float:
        """Return the objective on the images that are held out."""
        total = sum(float(self._imitation(images)) * len(images) for images in self._held_out)
        number = sum(map(len, self._held_out))
        return total_over_ranks(float(total)) / total_over_ranks(number)

    def _copy(self) -> List[Tensor]:
        return [param.detach().clone() for param in self._params]

    @torch.no_grad()
    def _put_back(self) -> None:
        for param, value in zip(self._params, self._state):
            param.copy_(value)


def learning_rate(share: float) -> float:
    """Return the learning rate at a point of the way, as a share of the highest one."""
    return min(1., (share + 1e-3) / WARM_UP) * (1 + math.cos(math.pi * share)) / 2


def _parts(images: Iterable[Tensor]) -> Iterator[Tuple[Tensor, Tensor]]:
    """Divide each batch into images to train with and images that are held out."""
    number = 0
    for batch in images:
        places = torch.arange(number, number + len(batch), device=batch.device)
        chosen = (places < FIRST_IMAGES) & (places % HELD_OUT_EVERY == 1)
        yield batch[~chosen], batch[chosen]
        number += len(batch)


def _held_out(images: Iterable[Tensor], like: Tensor) -> List[Tensor]:
    """Return the images that are held out; if there is only one image, that one."""
    trained, chosen, seen = [], [], 0
    for rest, part in _parts(images):
        trained.append(rest)
        chosen.append(part)
        seen += len(rest) + len(part)
        if seen >= FIRST_IMAGES:
            break
    if not total_over_ranks(seen):
        raise PruningError('there are no images to recover with')
    if not total_over_ranks(sum(map(len, chosen))):
        chosen = trained
    return [part.to(like) for part in chosen if len(part)]


def _endless(images: Iterable[Tensor]) -> Iterator[Optional[Tensor]]:
    """Yield batches to train with, again and again; None if there are none."""
    while True:
        empty = True
        for batch, _ in _parts(images):
            if len(batch):
                empty = False
                yield batch
        if empty:
            yield None

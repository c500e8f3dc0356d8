# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The accuracy of a detector before and after it is changed, on the same validation images."""
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch.nn as nn
from mmengine.config import Config

from mmgcp.datasets.calibration import evaluate
from mmgcp.errors import UserError
from mmgcp.nn.distributed import from_first_rank, total_over_ranks
from mmgcp.utils.process_state import random_states_kept

SECONDS = 60.  # that both measurements may take, about
PROBES = (1, 4)  # images: the first runs of a network are slow

Progress = Callable[[str, int, int], None]


class AccuracyRecord:
    """Measures a detector before and after it is changed.

    Args:
        cfg (Config): A complete config, with validation data or not.
        metric (str, optional): See :func:`mmgcp.datasets.calibration.evaluate`.
        num_images (int, optional): Number of validation images, the first ones; 0 for none.
            Defaults to None: as many as fit into about a minute, both times together; where
            there are none, nothing is measured.
        progress (Callable, optional): Called with a stage, the steps done in it, and all of them.

    Attributes:
        found (dict): ``metric``, ``images``, ``before`` and ``after``; ``not_measured``, the
            reason, where nothing is; empty where nothing is to be.
    """

    def __init__(self, cfg: Config, metric: Optional[str] = None,
                 num_images: Optional[int] = None, progress: Optional[Progress] = None):
        self._cfg, self._metric, self._number = cfg, metric, num_images
        self._progress = progress or (lambda stage, done, steps: None)
        self.found: Dict[str, Any] = {}

    def before(self, model: nn.Module) -> None:
        """Measure the detector as it is, on the device it is on.

        Raises:
            UserError: There are no validation data, or not this metric, although a number of
                images or a metric was asked for.
        """
        if self._number == 0:
            return
        required = self._number is not None or self._metric is not None
        try:
            with random_states_kept():  # so that the change is the same as without
                if self._number is None:
                    self._number = self._affordable(model)
                self.found = self._measure(model, 'before')
        except UserError as error:
            if required:
                raise
            self.found = dict(not_measured=str(error))

    def after(self, model: nn.Module) -> None:
        """Measure the changed detector on the same images, if it was measured before."""
        if 'before' not in self.found:
            return
        try:
            self.found.update(after=self._measure(model, 'after')['after'])
        except UserError as error:  # what has been done to the detector is not lost
            self.found = dict(not_measured=str(error))

    def _affordable(self, model: nn.Module) -> int:
        """How many images can be predicted in half of the time."""
        seconds: List[float] = []
        for number in PROBES:
            timed = _Timed(model)
            evaluate(timed, self._cfg, self._metric, number)
            seconds.append(timed.seconds / max(timed.images, 1))
        return max(PROBES[-1], int(SECONDS / 2 / max(from_first_rank(seconds[-1]), 1e-6)))

    def _measure(self, model: nn.Module, moment: str) -> Dict[str, Any]:
        found = measure_accuracy(
            model, self._cfg, self._metric, self._number,
            lambda *steps: self._progress(f'accuracy {moment}', *steps))
        return {'metric': found.metric, 'images': found.images, moment: found.value}


class Accuracy(NamedTuple):
    """The value of a metric for the first images of the validation data."""
    metric: str
    value: float
    images: int


def measure_accuracy(model: nn.Module, cfg: Config, metric: Optional[str] = None,
                     num_images: Optional[int] = None,
                     progress: Optional[Callable[[int, int], None]] = None) -> Accuracy:
    """Do as :func:`mmgcp.datasets.calibration.evaluate`, and count the images."""
    timed = _Timed(model)
    name, value = evaluate(timed, cfg, metric, num_images, progress)
    return Accuracy(name, value, int(total_over_ranks(timed.images)))


class _Timed(nn.Module):
    """A detector that counts the images that it predicts, and the seconds from the first one on."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector
        self.images, self.seconds = 0, 0.
        self._start: Optional[float] = None

    def val_step(self, data: Any) -> list:
        """Predict on a batch of a data loader."""
        self._start = time.monotonic() if self._start is None else self._start
        samples = self.detector.val_step(data)
        self.images += len(samples)
        self.seconds = time.monotonic() - self._start
        return samples

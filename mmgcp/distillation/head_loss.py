# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the losses between the predictions of two heads have in common."""
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import MODELS

from .responses import HeadRun, check_head


class HeadLoss(nn.Module):
    """Base of the losses between the predictions of the student's head and the teacher's.

    A loss consists of parts, which are reported as ``loss_<kind>_<part>``.

    Attributes:
        layers (list[tuple[str, str]]): Layers of student and teacher whose inputs it needs.
        adapters (list[nn.Module]): Its adapters.

    Args:
        weights (dict, optional): Multipliers of the parts; those that are left out keep their
            default. Defaults to None.

    Raises:
        UserError: There is no such part.
    """
    kind = 'head'
    parts: Dict[str, float] = {}

    def __init__(self, weights: Optional[Dict[str, float]] = None):
        super().__init__()
        unknown = set(weights or {}) - set(self.parts)
        if unknown:
            *others, last = map(repr, self.parts)
            raise UserError(f'weights may have the keys {", ".join(others)} and {last}, '
                            f'but has {sorted(unknown)}')
        self.weights = {**self.parts, **(weights or {})}
        self.layers: List[Tuple[str, str]] = []
        self.adapters: List[nn.Module] = []

    @property
    def loss_name(self) -> str:
        """The name that the first part is reported with."""
        return f'loss_{self.kind}_{next(iter(self.parts))}'

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """Prepare for two detectors; a UserError says if their heads do not fit the loss."""
        check_head(student, 'student')
        check_head(teacher, 'teacher')

    def compare(self, student: HeadRun, teacher: HeadRun) -> Dict[str, Tensor]:
        """Compare two runs on the same images."""
        return self(student.responses, teacher.responses)

    def _weighted(self, losses: Dict[str, Callable[[], Tensor]]) -> Dict[str, Tensor]:
        """Compute parts and multiply them with their weights; those of no weight are left out."""
        return {f'loss_{self.kind}_{part}': self.weights[part] * compute()
                for part, compute in losses.items() if self.weights[part]}


def build_head_losses(configs: Union[dict, Sequence[dict], None]) -> List[HeadLoss]:
    """Build losses from the config of one or those of several, which must differ in their types."""
    if configs is None:
        return []
    if isinstance(configs, dict):
        configs = [configs]
    if not (isinstance(configs, (list, tuple)) and all(
            isinstance(config, dict) for config in configs)):
        raise UserError('response must be the config of a loss or a list of them, but is '
                        f'{configs!r}')
    losses = [MODELS.build(config) for config in configs]
    for loss in losses:
        if not isinstance(loss, HeadLoss):
            raise UserError('response must be a loss between the predictions of heads, but is a '
                            f'{type(loss).__name__}')
    if len({loss.kind for loss in losses}) < len(losses):
        names = [type(loss).__name__ for loss in losses]
        raise UserError(f'the losses of the response must be of different types, but are {names}')
    return losses


def mean_of(values: Tensor) -> Tensor:
    """Return the mean, or 0 if there are no values."""
    return values.sum() / max(len(values), 1)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the losses between the predictions of two heads have in common."""
from typing import Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError, shown
from mmgcp.registry import MODELS, build_part
from mmgcp.utils.checks import CONFIG, LOSS_WEIGHT, check_value, list_of, number_in

from .responses import HeadRun, check_head

RESPONSE = list_of(CONFIG, 'must be the config of a loss or a list of them', empty=True)
TEMPERATURE = number_in(0, 1e6, open_low=True)


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
        UserError: There is no such part, or a multiplier is not allowed.
    """
    kind = 'head'
    parts: Dict[str, float] = {}

    def __init__(self, weights: Optional[Dict[str, float]] = None):
        super().__init__()
        unknown = set(weights or {}) - set(self.parts)
        if unknown:
            *others, last = map(repr, self.parts)
            raise UserError(f'weights may have the keys {", ".join(others)} and {last}, '
                            f'but has {shown(sorted(unknown, key=str))}')
        for part, value in (weights or {}).items():
            check_value(f'the weight of {part!r}', value, LOSS_WEIGHT, owner=type(self).__name__)
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
    check_value('response', configs, RESPONSE)
    losses = [build_part(MODELS, config, 'loss between the predictions of heads',
                         lambda kind: isinstance(kind, type) and issubclass(kind, HeadLoss))
              for config in configs]
    if len({loss.kind for loss in losses}) < len(losses):
        names = [type(loss).__name__ for loss in losses]
        raise UserError(f'the losses of the response must be of different types, but are {names}')
    return losses


def mean_of(values: Tensor) -> Tensor:
    """Return the mean, or 0 if there are no values."""
    return values.sum() / max(len(values), 1)

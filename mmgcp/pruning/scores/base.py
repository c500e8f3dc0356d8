# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What a pruning criterion is."""
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelSlice, ChannelUnit
from mmgcp.registry import TASK_UTILS

Progress = Callable[[str, int, int], None]


class Criterion:
    """Scores the channels of channel units: the lower a score, the sooner it is removed.

    Scores are compared with the threshold of a layer group, so those of different layers
    must be comparable.

    Attributes:
        needs (str, optional): What :meth:`prepare` needs besides the model: 'images' for
            batches of training images, 'losses' for such with ground truth, or None.
        trains (bool): Whether weights are trained before the channels are removed.
        default_allocation (str): How many channels each unit loses if nothing is said: 'global'
            or 'uniform', see :func:`mmgcp.pruning.prune`.
    """
    needs: Optional[str] = None
    trains = False
    default_allocation = 'global'

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Collect what the scores need, once, before the first is asked for.

        Leaves the model as it was, gradients included.

        Args:
            model (nn.Module): The model.
            units (Sequence[ChannelUnit]): All units that will be scored.
            batches (Iterable[Batch], optional): Training batches. Can be gone through more
                than once; memory must not grow with their number.
            progress (Callable): Called with a stage, the steps done in it, and all its steps.
        """

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Score the channels of a channel unit.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.

        Returns:
            dict[str, Tensor]: Scores (C, ), NaN for channels that have none. Either one row
            by the name of the unit, or a row for each layer that has an opinion, by its name;
            the layers' verdicts are merged then. Empty if the unit cannot be scored: it is
            left alone.
        """
        raise NotImplementedError


def criterion_names() -> List[str]:
    """List the names of all registered criteria, as they stand behind ``mmgcp.``."""
    return sorted(name for name, kind in TASK_UTILS.module_dict.items()
                  if isinstance(kind, type) and issubclass(kind, Criterion))


def as_row(unit: ChannelUnit, item: ChannelSlice, values: Tensor) -> Tensor:
    """Turn the values of a layer's channels into a row of scores of a unit.

    Args:
        unit (ChannelUnit): The unit, of size C.
        item (ChannelSlice): The layer's channels.
        values (Tensor): Values (K, ) of all channels of the layer on that side.

    Returns:
        Tensor: The scores (C, ), NaN for channels that the layer does not have.
    """
    row = torch.full((unit.size, ), float('nan'))
    row[item.unit_index] = values.detach().cpu().float()[item.channels]
    return row

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What a criterion is that prunes one unit of layers after the other."""
from typing import Dict, Iterable, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.compensation.statistics import Norms
from mmgcp.pruning.scores.base import Criterion, Progress
from mmgcp.pruning.units import ChannelUnit

# Layer -> its BatchNorms -> mean (K, ) of its inputs that belong to a unit
Means = Dict[str, Dict[Norms, Tensor]]


class LayerwiseCriterion(Criterion):
    """Chooses the channels of one channel unit after the other, and adapts what is left.

    The units are gone through in the order in which the model computes them. For each, its
    channels are scored on the model as it is then (the channels removed before are off, the
    weights adapted), the lowest are switched off, and the weights are adapted to that. How
    many channels of a unit go is decided before: by the ratios, thresholds or budget, on the
    scores of the criterion ``allocation_criterion``.

    Args:
        allocation_criterion (dict, optional): Config of the criterion whose scores decide how many
            channels each unit loses. Defaults to None: the same share of all units of a group.

    Attributes:
        folded (bool): Whether what the removed channels of a unit emit on average is folded
            into the layers that read them, between :meth:`score` and :meth:`update`. Set
            before :meth:`begin`.
    """
    needs = 'images'
    trains = True
    folded = False

    def __init__(self, allocation_criterion: Optional[dict] = None):
        self.allocation_criterion = allocation_criterion

    @property
    def default_allocation(self) -> str:
        """How many channels each unit loses: the same share, or by the scores of another."""
        return 'uniform' if self.allocation_criterion is None else 'global'

    def expect_folding(self, folded: bool) -> None:
        """Tell whether removed channels are folded between :meth:`score` and :meth:`update`."""
        self.folded = folded

    def skips(self, model: nn.Module, unit: ChannelUnit) -> Optional[str]:
        """Say whether a unit is to be left alone.

        Args:
            model (nn.Module): The model, nothing of which has been removed.
            unit (ChannelUnit): The unit.

        Returns:
            str | None: The reason, or None if channels of the unit may be removed.
        """
        return None

    def begin(self, model: nn.Module, units: Sequence[ChannelUnit],
              batches: Iterable[Batch], progress: Progress) -> None:
        """Get ready, before the first unit; nothing has been removed yet.

        Args:
            model (nn.Module): The model.
            units (Sequence[ChannelUnit]): The units that will be pruned, in order.
            batches (Iterable[Batch]): Training batches, to be gone through any number of times.
            progress (Callable): Called with a stage, the steps done in it, and all its steps.
        """

    def score(self, model: nn.Module, unit: ChannelUnit,
              batches: Iterable[Batch]) -> Tensor:
        """Score the channels of a unit; leaves the model as it was.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.
            batches (Iterable[Batch]): Training batches.

        Returns:
            Tensor: Scores (C, ), the lowest of which are removed.
        """
        raise NotImplementedError

    def mean_inputs(self, unit: ChannelUnit) -> Optional[Means]:
        """Tell what the layers that read a unit read on average, if :meth:`score` measured it.

        Args:
            unit (ChannelUnit): The unit that was scored last.

        Returns:
            dict[str, dict[tuple, Tensor]] | None: The mean (K, ), over all batches, of the
            inputs of each layer that belong to the unit, in the order of its slice, by the
            BatchNorms that read its output. Defaults to None: whoever needs it measures it.
        """
        return None

    def update(self, model: nn.Module, unit: ChannelUnit, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Adapt the weights in place to the channels that were just removed.

        Since :meth:`score` of this unit nothing else has changed in the model, but for the means
        that were folded.

        Args:
            model (nn.Module): The model, with these channels off already.
            unit (ChannelUnit): The unit.
            removed (Tensor): Ascending indices (K, ) of its removed channels.
            batches (Iterable[Batch]): Training batches.
        """

    def state_dict(self) -> dict:
        """What :meth:`begin` and :meth:`update` learned, to resume between two units.

        The model's weights are saved beside it.
        """
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what :meth:`state_dict` returned, instead of :meth:`begin`."""

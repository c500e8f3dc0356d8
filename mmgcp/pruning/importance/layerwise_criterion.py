# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What a criterion is that prunes one set of layers after the other."""
from typing import Dict, Iterable, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from ..input_statistics import Norms
from ..structures import CoupledChannels
from ..training_loss import Batch
from .criterion import Criterion, Progress

# Layer -> its BatchNorms -> mean (K, ) of its inputs that belong to a set
Means = Dict[str, Dict[Norms, Tensor]]


class LayerwiseCriterion(Criterion):
    """Chooses the channels of one coupled set after the other, and adapts what is left.

    The sets are gone through in the order in which the model computes them. For each, its
    channels are scored on the model as it is then (the channels removed before are off, the
    weights adapted), the lowest are switched off, and the weights are adapted to that. How
    many channels of a set go is decided before: by the ratios, thresholds or budget, on the
    scores of the criterion ``allocation``.

    Args:
        allocation (dict, optional): Config of the criterion whose scores decide how many
            channels each set loses. Defaults to None: the same share of all sets of a group.

    Attributes:
        folded (bool): Whether what the removed channels of a set emit on average is folded
            into the layers that read them, between :meth:`score` and :meth:`update`. Set
            before :meth:`begin`.
    """
    needs = 'images'
    folded = False

    def __init__(self, allocation: Optional[dict] = None):
        self.allocation = allocation

    @property
    def default_allocation(self) -> str:
        """How many channels each set loses: the same share, or by the scores of another."""
        return 'uniform' if self.allocation is None else 'global'

    def skips(self, model: nn.Module, coupled: CoupledChannels) -> Optional[str]:
        """Say whether a set is to be left alone.

        Args:
            model (nn.Module): The model, nothing of which has been removed.
            coupled (CoupledChannels): The set.

        Returns:
            str | None: The reason, or None if channels of the set may be removed.
        """
        return None

    def begin(self, model: nn.Module, coupled_sets: Sequence[CoupledChannels],
              batches: Iterable[Batch], progress: Progress) -> None:
        """Get ready, before the first set; nothing has been removed yet.

        Args:
            model (nn.Module): The model.
            coupled_sets (Sequence[CoupledChannels]): The sets that will be pruned, in order.
            batches (Iterable[Batch]): Training batches, to be gone through any number of times.
            progress (Callable): Called with a stage, the steps done in it, and all its steps.
        """

    def score(self, model: nn.Module, coupled: CoupledChannels,
              batches: Iterable[Batch]) -> Tensor:
        """Score the channels of a set; leaves the model as it was.

        Args:
            model (nn.Module): The model.
            coupled (CoupledChannels): The set, of size C.
            batches (Iterable[Batch]): Training batches.

        Returns:
            Tensor: Scores (C, ), the lowest of which are removed.
        """
        raise NotImplementedError

    def mean_inputs(self, coupled: CoupledChannels) -> Optional[Means]:
        """Tell what the layers that read a set read on average, if :meth:`score` measured it.

        Args:
            coupled (CoupledChannels): The set that was scored last.

        Returns:
            dict[str, dict[tuple, Tensor]] | None: The mean (K, ), over all batches, of the
            inputs of each layer that belong to the set, in the order of its slice, by the
            BatchNorms that read its output. Defaults to None: whoever needs it measures it.
        """
        return None

    def update(self, model: nn.Module, coupled: CoupledChannels, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Adapt the weights in place to the channels that were just removed.

        Since :meth:`score` of this set nothing else has changed in the model, but for the means
        that were folded.

        Args:
            model (nn.Module): The model, with these channels off already.
            coupled (CoupledChannels): The set.
            removed (Tensor): Ascending indices (K, ) of its removed channels.
            batches (Iterable[Batch]): Training batches.
        """

    def state_dict(self) -> dict:
        """What :meth:`begin` and :meth:`update` learned, to resume between two sets.

        The model's weights are saved beside it.
        """
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take over what :meth:`state_dict` returned, instead of :meth:`begin`."""

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The interface of criteria that prune one channel unit after the other."""
from typing import Dict, Iterable, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.compensation.statistics import Norms
from mmgcp.pruning.scores.base import Criterion, Progress
from mmgcp.pruning.units import ChannelUnit
from mmgcp.utils.checks import CONFIG, checked

# Consumer -> its BatchNorms -> mean (K, ) of those of its inputs that belong to a unit
Means = Dict[str, Dict[Norms, Tensor]]


class LayerwiseCriterion(Criterion):
    """Chooses the channels of one unit after the other and adapts the weights in between.

    Units are pruned in the order in which the model computes them. The channels of each are
    scored on the model in its current state: channels of earlier units are switched off, and
    the weights have been adapted to that. Then the channels with the lowest scores are
    switched off, and the weights adapted again. How many channels each unit loses is decided
    beforehand from the ratios, thresholds or budget, with the scores of another criterion.

    Of several processes, each has batches of its own, and :meth:`begin`, :meth:`score` and
    :meth:`update` have to join what they have found (see :mod:`mmgcp.nn.distributed`), so that
    the weights stay the same everywhere.

    Args:
        allocation_criterion (dict, optional): Config of the criterion whose scores decide how
            many channels each unit loses. Defaults to None: all units of a layer group lose
            the same share.

    Attributes:
        folded (bool): Whether the mean outputs of removed channels are folded into their
            consumers between :meth:`score` and :meth:`update`. Set before :meth:`begin`.
    """
    needs = 'images'
    trains = True
    not_in_steps = ('it goes layer by layer, and prune_cfg.finetune trains the model after each '
                    'channel unit')
    folded = False

    @checked(PruningError, allocation_criterion=CONFIG)
    def __init__(self, allocation_criterion: Optional[dict] = None):
        self.allocation_criterion = allocation_criterion

    @property
    def default_allocation(self) -> str:
        """The default of prune()'s option: 'uniform' without a criterion for the allocation."""
        return 'uniform' if self.allocation_criterion is None else 'global'

    def expect_folding(self, folded: bool) -> None:
        """Set :attr:`folded`."""
        self.folded = folded

    def skips(self, model: nn.Module, unit: ChannelUnit) -> Optional[str]:
        """Return why a unit of a model must not be pruned, or None if it may be."""
        return None

    def begin(self, model: nn.Module, units: Sequence[ChannelUnit],
              batches: Iterable[Batch], progress: Progress) -> None:
        """Prepare for pruning. Called once, while the model still has all of its channels.

        Args:
            model (nn.Module): The model.
            units (Sequence[ChannelUnit]): The units that will be pruned, in order.
            batches (Iterable[Batch]): Training batches, which can be iterated any number of
                times; the same for :meth:`score` and :meth:`update`.
            progress (Callable): Called with the name of a stage, the number of finished steps
                and the number of all steps of the stage.
        """

    def score(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch]) -> Tensor:
        """Return the scores (C, ) of a unit's channels, without changing the model.

        The channels with the lowest scores are removed.
        """
        raise NotImplementedError

    def mean_inputs(self, unit: ChannelUnit) -> Optional[Means]:
        """Return the mean inputs of a unit's consumers, if :meth:`score` has measured them.

        Args:
            unit (ChannelUnit): The unit that was scored last.

        Returns:
            dict[str, dict[tuple, Tensor]] | None: By name of the consumer and by the BatchNorms
            that read its output: the means (K, ) over all batches of the inputs that belong to
            the unit, in the order of the consumer's slice. None if they are not known.
        """
        return None

    def update(self, model: nn.Module, unit: ChannelUnit, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Adapt the weights of a model in place to the removal of channels of a unit.

        ``removed`` are their ascending indices (K, ). Since :meth:`score` was called for the unit,
        they have been switched off and perhaps their means folded; nothing else in the model has
        changed.
        """

    def state_dict(self) -> dict:
        """Return what :meth:`begin` and :meth:`update` have learned, to resume pruning later.

        The model's weights are saved separately.
        """
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned. Called in place of :meth:`begin`."""

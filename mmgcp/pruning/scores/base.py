# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What a pruning criterion is, and the simplest one."""
import zlib
from typing import Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelSlice, ChannelUnit
from mmgcp.registry import TASK_UTILS, task_util_names
from mmgcp.utils.checks import SEED, checked

Progress = Callable[[str, int, int], None]


class Criterion:
    """Scores the channels of channel units: those with the lowest scores are removed first.

    All scores in a layer group are compared with the same threshold, so scores of different
    layers have to be comparable.

    Attributes:
        needs (str, optional): What :meth:`prepare` needs besides the model: 'images' for
            batches of training images, 'losses' for batches with ground truth, or None.
        trains (bool): Whether weights are trained before the channels are removed.
        default_allocation (str): How many channels each unit loses unless the user says so:
            'global', 'uniform' or 'measured', see :func:`mmgcp.pruning.prune`.
        needs_budget (bool): Whether shares of parameters or MACs, or a time, must say how much
            goes, because ratios and thresholds would mean other amounts for what is compared.
        not_in_steps (str, optional): Why it cannot be used in several steps, on a model that
            has been pruned and trained since; None if it can.
        not_without_blocks (str, optional): Why it cannot be used where blocks have been removed
            before; None if it can.
    """
    needs: Optional[str] = None
    trains = False
    default_allocation = 'global'
    needs_budget = False
    not_in_steps: Optional[str] = None
    not_without_blocks: Optional[str] = None

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Collect what the scores need, once, before any unit is scored.

        It leaves the model as it was, gradients included. Of several processes, each has batches
        of its own, and this has to join what they have found: see :mod:`mmgcp.nn.distributed`.

        Args:
            model (nn.Module): The model.
            units (Sequence[ChannelUnit]): All units that will be scored.
            batches (Iterable[Batch], optional): Training batches, which can be iterated over
                several times. Memory must not grow with their number.
            progress (Callable): Called with the name of a stage, the number of steps done, and
                the number of all its steps.
        """

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Score the channels of a channel unit.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, with C channels.

        Returns:
            dict[str, Tensor]: Scores (C, ), NaN for channels without a score: either one
            tensor by the name of the unit, or one for each layer that votes, by the name of
            the layer; the votes are merged later. Empty if the unit cannot be scored, and
            then it is not pruned.
        """
        raise NotImplementedError

    def join_branches(self, scores: Tensor) -> Tensor:
        """Score channels of a kernel that is a sum of parallel branches, each of which has scores.

        Here it is the root of the sum of squares: branches with the standard deviations s_b, as
        the scale factors of BatchNorms are, have a sum with that standard deviation if they are
        not correlated.

        Args:
            scores (Tensor): Scores (B, C) of B layers.

        Returns:
            Tensor: Scores (C, ), NaN where a layer has none.
        """
        return scores.square().sum(0).sqrt()


@TASK_UTILS.register_module()
class Random(Criterion):
    """Uniformly random scores in [0, 1), the baseline of all other criteria.

    They depend only on the seed, the name of the channel unit and its number of channels.

    Args:
        seed (int): Seed. Defaults to 0.
    """

    @checked(PruningError, seed=SEED)
    def __init__(self, seed: int = 0):
        self.seed = seed

    def __call__(self, model: nn.Module, unit: ChannelUnit) -> Dict[str, Tensor]:
        """Return scores (C, ) by the name of the unit."""
        generator = torch.Generator().manual_seed(zlib.crc32(f'{self.seed} {unit.name}'.encode()))
        return {unit.name: torch.rand(unit.size, generator=generator)}


def criterion_names() -> List[str]:
    """List the names of all registered criteria, without the prefix ``mmgcp.``."""
    return task_util_names(Criterion)


def unit_scores(unit: ChannelUnit, item: ChannelSlice, values: Tensor) -> Tensor:
    """Turn values of all channels of a layer on a side into scores (C, ) of a unit's channels.

    Channels that the layer does not have get NaN.
    """
    scores = torch.full((unit.size, ), float('nan'))
    scores[item.unit_index] = values.detach().cpu().float()[item.channels]
    return scores


def relative_roots(importances: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Turn importances (C, ) by name of the unit, NaN where there are none, into scores.

    A budget is spent by the squares of scores. So the score is the square root of the
    importance, divided by the mean of all roots, so that 1 is an average channel of the model.
    """
    roots = {name: values.sqrt() for name, values in importances.items()}
    mean = torch.cat([torch.zeros(0), *roots.values()]).nanmean()
    return {name: values / mean if mean > 0 else values for name, values in roots.items()}

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The best of several criteria: the one without whose channels a detector has the least loss."""
import warnings
from dataclasses import replace
from functools import partial
from typing import Dict, Iterable, List, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError, UnreachableError
from mmgcp.nn.distributed import first_items, from_first_rank
from mmgcp.nn.training_loss import Batch
from mmgcp.registry import TASK_UTILS, build_task_util
from mmgcp.utils.checks import CONFIGS, checked

from .blocks.scores import mean_loss
from .remaining import remaining_channels
from .scores import Criterion
from .scores.base import Progress
from .sensitivity import metric_without
from .strategy import MEASURED_BATCHES, Decision, PruningTask, decide
from .units import ChannelUnit


@TASK_UTILS.register_module()
class BestOf(Criterion):
    """Several criteria, of which the one counts that leaves the least training loss.

    Each decides as it would alone on what a budget leaves. Then the channels that it has chosen
    are switched off, what reads them makes up for that, and the loss is measured; all with a few
    of the batches. That candidates are told apart by what is left of them before any training,
    once their BatchNorms are adapted, is from `EagleEye (arXiv 2007.02491)
    <https://arxiv.org/abs/2007.02491>`_.

    Args:
        criteria (Sequence[dict]): The configs of the criteria. Defaults to ``OBS``, for which no
            sparse training is needed, and ``BNScale``, which is for what it leaves.

    Raises:
        PruningError: There are none, or one of them goes layer by layer or is a ``BestOf``.
    """
    needs = 'losses'
    needs_budget = True

    @checked(PruningError, criteria=CONFIGS)
    def __init__(self, criteria: Sequence[dict] = (dict(type='mmgcp.OBS'),
                                                   dict(type='mmgcp.BNScale'))):
        self.criteria = list(criteria)
        for criterion in self.built():
            if criterion.trains or isinstance(criterion, BestOf):
                raise PruningError(f'BestOf cannot try {type(criterion).__name__}, which does not '
                                   'choose channels by scores alone')

    def built(self) -> List[Criterion]:
        """Build the criteria."""
        return [build_task_util(config, Criterion, PruningError) for config in self.criteria]

    @property
    def not_in_steps(self) -> Optional[str]:
        """The first reason of a criterion."""
        return next(filter(None, (item.not_in_steps for item in self.built())), None)

    @property
    def not_without_blocks(self) -> Optional[str]:
        """The first reason of a criterion."""
        return next(filter(None, (item.not_without_blocks for item in self.built())), None)

    def prepare(self, model: nn.Module, units: Sequence[ChannelUnit],
                batches: Optional[Iterable[Batch]], progress: Progress) -> None:
        """Say that it has no scores of its own.

        Raises:
            PruningError: Always.
        """
        raise PruningError('BestOf has no scores of its own, so that it cannot be the '
                           'allocation_criterion of another criterion')


@decide.register(BestOf)
def _decide(criterion: BestOf, task: PruningTask) -> Decision:
    """Let each criterion decide; return the decision that leaves the least loss.

    A criterion that cannot decide is left out with a warning, unless none can.
    """
    task.check_data(criterion)
    decisions: List[Decision] = []
    tried: List[Dict[str, object]] = []
    problems: List[PruningError] = []
    for config, candidate in zip(criterion.criteria, criterion.built()):
        options = replace(task.options, criterion=config)
        try:
            decision = decide(candidate, replace(task, options=options,
                                                 skipped=dict(task.skipped)))
            removed = decision.plan.removed()
            loss = _loss_without(task, removed)
        except PruningError as error:
            problems.append(error)
            continue
        decisions.append(decision)
        tried.append(dict(criterion=options.record()['criterion'], loss=loss,
                          shares=list(task.spent.shares(removed))))
    if not decisions:  # other multiples of channels may do where a budget is what fails
        raise next((item for item in problems if isinstance(item, UnreachableError)), problems[0])
    for problem in problems:
        warnings.warn(f'BestOf leaves out a criterion: {problem}', stacklevel=2)
    best = from_first_rank(min(range(len(tried)), key=lambda number: tried[number]['loss']))
    decisions[best].plan.options['tried'] = tried
    return decisions[best]


def _loss_without(task: PruningTask, removed: Dict[str, Tensor]) -> float:
    """Measure the loss of a detector that has made up for channels (K, ) of units without them."""
    options = task.options
    images = options.calibration and first_items(options.calibration, MEASURED_BATCHES)
    batches = first_items(options.batches, MEASURED_BATCHES)
    evaluate = partial(mean_loss, batches=batches, progress=options.progress)
    return metric_without(task.model, task.left, remaining_channels(removed, task.gone), evaluate,
                          task.compensator(images))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one path from a model to a pruned model."""
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import record_convs
from mmgcp.registry import TASK_UTILS

from .budget import CostModel, find_thresholds
from .compensation import compensate as fold_offsets
from .dependency_graph import find_coupled_channels
from .planner import group_scores, make_plan, score_sets, thresholds_of_groups
from .pruned_detector import ChannelTable, count_channels
from .structures import LayerGroup, PruningError, PruningPlan, make_group
from .surgery import remove_channels


@dataclass
class PruningResult:
    """What pruning led to.

    Attributes:
        model (nn.Module): The pruned model.
        plan (PruningPlan): What was removed.
        channels_before (ChannelTable): Channels of all layers before.
        channels_after (ChannelTable): Channels of all layers after.
        params (List[int]): Parameters before and after.
        macs (List[int]): Multiply-accumulate operations for one image before and after.
        scores (Dict[str, Tensor]): All scores (K, ) by layer group.
        uncompensated (List[str]): Layers that could not absorb the constants of
            removed channels; see :func:`mmgcp.pruning.compensation.compensate`.
    """
    model: nn.Module
    plan: PruningPlan
    channels_before: ChannelTable
    channels_after: ChannelTable
    params: List[int]
    macs: List[int]
    scores: Dict[str, Tensor]
    uncompensated: List[str]

    @property
    def changed_channels(self) -> ChannelTable:
        """The channels after of the layers that were pruned."""
        return {name: counts for name, counts in self.channels_after.items()
                if counts != self.channels_before[name]}


def prune(model: nn.Module,
          groups: Sequence[Union[LayerGroup, dict]],
          target_params: Optional[float] = None,
          target_flops: Optional[float] = None,
          criterion: dict = dict(type='mmgcp.BNScale'),
          merge: str = 'or',
          min_keep_ratio: float = 0.01,
          compensate: bool = True,
          input_shape: Sequence[int] = (3, 640, 640)) -> PruningResult:
    """Prune the channels of a detector in groups of layers.

    Group channel pruning, `GCP-SAD (arXiv 2306.01526)
    <https://arxiv.org/abs/2306.01526>`_.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``. It is
            pruned in place.
        groups (Sequence[LayerGroup | dict]): The layer groups. Each has a ratio, a
            threshold, or leaves its threshold to the budget.
        target_params (float, optional): Share of the parameters to keep.
        target_flops (float, optional): Share of the operations to keep.
        criterion (dict): Config of the criterion that scores channels.
        merge (str): See :func:`mmgcp.pruning.planner.choose_channels`.
        min_keep_ratio (float): At least this share of a layer's channels stays.
        compensate (bool): Fold the constants that removed channels emit into the
            layers that read them. Defaults to True.
        input_shape (Sequence[int]): Shape (C, H, W) of an image in pixels, which the
            operations are counted for.

    Returns:
        PruningResult: The pruned model, the plan and figures for a report.

    Raises:
        PruningError: The request cannot be met; the model has not been touched.
    """
    groups = [item if isinstance(item, LayerGroup) else make_group(item) for item in groups]
    if not groups:
        raise PruningError('there are no layer groups: nothing would be pruned')
    for name, target in (('target_params', target_params), ('target_flops', target_flops)):
        if target is not None and not 0 < target <= 1:
            raise PruningError(f'{name} is the share to keep, in (0, 1], but is {target}')
    coupled_sets, skipped = find_coupled_channels(model)
    scored = score_sets(model, coupled_sets, TASK_UTILS.build(criterion), groups, skipped)
    cost = CostModel(model, record_convs(model, input_shape), coupled_sets)

    thresholds = thresholds_of_groups(scored, groups)
    if target_params is not None or target_flops is not None:
        thresholds = find_thresholds(
            scored, groups, cost, lambda tried: make_plan(scored, tried, merge, min_keep_ratio),
            thresholds, target_params, target_flops)
    elif len(thresholds) < len(groups):
        missing = [group.name for group in groups if group.name not in thresholds]
        raise PruningError(f'layer groups {missing} have neither a ratio nor a threshold, and no '
                           'budget is given (target_params, target_flops)')
    plan = make_plan(scored, thresholds, merge, min_keep_ratio)
    plan.skipped = skipped
    plan.options = dict(
        criterion=dict(criterion), merge=merge, min_keep_ratio=min_keep_ratio,
        compensate=compensate, target_params=target_params, target_flops=target_flops)

    removed = plan.removed()
    params, macs = cost(removed)
    before = count_channels(model)
    uncompensated = fold_offsets(model, coupled_sets, removed) if compensate else []
    remove_channels(model, coupled_sets, removed)
    return PruningResult(
        model=model,
        plan=plan,
        channels_before=before,
        channels_after=count_channels(model),
        params=[cost.params, params],
        macs=[cost.macs, macs],
        scores={group.name: group_scores(scored, group) for group in groups},
        uncompensated=uncompensated)

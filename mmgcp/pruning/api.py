# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one path from a model to a pruned model."""
from dataclasses import asdict, replace
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import record_convs
from mmgcp.datasets.calibration import ImagesOf
from mmgcp.errors import PruningError
from mmgcp.nn.forward import IMAGE_SHAPE, working_shape
from mmgcp.nn.layers import find_layer, is_depthwise
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.compensation.compensator import Compensator
from mmgcp.pruning.layerwise.engine import (
    Finetune,
    LayerByLayer,
    Unfinished,
    digest_request,
    drop_skipped,
    order_units,
    repeatable,
    settings_of,
)
from mmgcp.registry import TASK_UTILS

from .allocation import allocation_scorer, check_allocation, rank_units, ratios_as_shares
from .auto_groups import auto_groups
from .budget import Budget, CostModel, find_thresholds
from .detector import ChannelTable, count_channels
from .graph import find_units
from .layerwise import LayerwiseCriterion
from .masking import channels_off, check_same_predictions, raw_predictions, restored_on_error
from .plan import PruningPlan, complete_plan, validate_plan
from .planner import (
    Planner,
    ScoredUnit,
    Thresholds,
    group_scores,
    score_units,
    thresholds_of_groups,
)
from .result import PruningResult
from .scores import Criterion
from .sensitivity import measure_sensitivity
from .surgery import gather_channels, remove_channels
from .units import ChannelUnit, LayerGroup, make_group

Groups = Union[str, Sequence[Union[LayerGroup, dict]]]
# Makes up for removed channels; returns the layers that could not absorb all of it
Compensate = Callable[[Dict[str, Tensor]], List[str]]


def prune(model: nn.Module,
          groups: Groups = 'auto',
          ratio: Optional[float] = None,
          target_params: Optional[float] = None,
          target_flops: Optional[float] = None,
          criterion: dict = dict(type='mmgcp.BNScale'),
          allocation: Optional[str] = None,
          merge: str = 'or',
          min_keep_ratio: float = 0.01,
          round_to: int = 1,
          plan: Union[PruningPlan, str, Path, None] = None,
          compensate: Union[bool, str] = True,
          calibration: Optional[Iterable[Tensor]] = None,
          batches: Optional[Iterable[Batch]] = None,
          evaluate: Optional[Callable[[nn.Module], float]] = None,
          finetune: Optional[Finetune] = None,
          checkpoint_file: Union[str, Path, None] = None,
          input_shape: Sequence[int] = IMAGE_SHAPE,
          dry_run: bool = False,
          progress: Callable[[str, int, int], None] = lambda stage, done, steps: None
          ) -> PruningResult:
    """Prune the channels of a detector in groups of layers.

    Group channel pruning, `GCP-SAD (arXiv 2306.01526)
    <https://arxiv.org/abs/2306.01526>`_.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``, or a
            two-stage detector of MMDetection. It is pruned in place.
        groups (str | Sequence[LayerGroup | dict]): The layer groups. Each has a ratio, a
            threshold, or leaves its threshold to the budget. ``'auto'`` makes them by
            kind of module and stride; see :func:`mmgcp.pruning.auto_groups.auto_groups`.
        ratio (float, optional): Pruning ratio of all groups, instead of their own.
        target_params (float, optional): Share of the parameters to keep.
        target_flops (float, optional): Share of the MACs to keep.
        criterion (dict): Config of the criterion that scores channels. With a
            :class:`mmgcp.pruning.LayerwiseCriterion` the units are pruned one after the other,
            each on the model that was adapted to what is gone already.
        allocation (str, optional): How many channels a channel unit loses: as many as have
            scores below the one threshold of their group (``'global'``), or the same share of
            each unit of a group, those with the lowest scores (``'uniform'``; ratios and
            thresholds of groups are this share). By default the criterion decides: 'uniform'
            for L1Norm, L2Norm, FPGM and layer-wise ones without an option ``allocation`` of
            their own, else 'global'.
        merge (str): How coupled layers decide together: 'or', 'mean', 'majority' or 'sum';
            see :mod:`mmgcp.pruning.merges`.
        min_keep_ratio (float): At least this share of a layer's channels stays.
        round_to (int): Keep multiples of so many channels, without exceeding the budget.
        plan (PruningPlan | str | Path, optional): What to remove, or the file of such a plan;
            nothing else decides it then.
        compensate (bool | str): Make up for what is removed: ``'fold-means'``, ``'adapt-norms'``,
            False, or True for the best that is possible; see
            :class:`mmgcp.pruning.compensation.compensator.Compensator`.
        calibration (Iterable[Tensor], optional): Batches (N, C, H, W) of preprocessed
            images to measure on what is made up for. Without them only constants are.
        batches (Iterable[Batch], optional): Batches of training data for criteria that
            need them; see :class:`mmgcp.pruning.Criterion`.
        evaluate (Callable, optional): Gives a metric of a model, the higher the better.
            The budget is spent where this metric suffers least then.
        finetune (Callable, optional): Only with a layer-wise criterion: called with the model
            and the number of finished units after each unit, to train the model in place. What
            has been removed stays off meanwhile. Its attribute ``settings``, if it has one, is
            part of the plan's options.
        checkpoint_file (str | Path, optional): Only of use with a layer-wise criterion: what
            is done is saved here after each unit. If pruning is interrupted, the same request
            for the same weights goes on from there and leads to exactly the same result;
            another one begins anew. Which data ``batches`` and ``calibration`` yield is not
            compared, but for the number of ``batches``. The file stays: remove it when the result
            is saved.
        input_shape (Sequence[int]): Shape (C, H, W) of an image in pixels, which the
            MACs are counted for.
        dry_run (bool): Make the plan and leave the model alone. With a layer-wise criterion
            the plan tells how many channels go, but not which: nothing is scored. Defaults
            to False.
        progress (Callable): Called with a stage, the steps done in it, and all its steps.

    Returns:
        PruningResult: The pruned model, the plan and figures for a report.

    Raises:
        PruningError: The request cannot be met; the model has not been touched.
    """
    if isinstance(plan, (str, Path)):
        plan = PruningPlan.load(plan)
    budget = Budget(target_params, target_flops)
    progress('tracing', 0, 2)
    shape = working_shape(model, input_shape)
    units, skipped = find_units(model, shape)
    progress('tracing', 1, 2)
    cost = CostModel(model, record_convs(model, input_shape), units)
    progress('tracing', 2, 2)

    calibration, batches = repeatable(calibration), repeatable(batches)
    compensator = Compensator(model, units, compensate, calibration, shape)

    if plan is not None:
        validate_plan(plan, units)
        return _finish(model, units, plan, cost, {}, compensator, shape, dry_run, progress)
    automatic = groups == 'auto'
    groups = _make_groups(model, groups, ratio, input_shape)
    scorer, candidates = TASK_UTILS.build(criterion), units
    layerwise = scorer if isinstance(scorer, LayerwiseCriterion) else None
    uniform = check_allocation(allocation, scorer)
    if uniform:
        groups = ratios_as_shares(groups)
    if layerwise is not None:
        candidates = drop_skipped(model, units, layerwise, skipped)
        scorer = allocation_scorer(layerwise)
        if not dry_run:
            _check_data(layerwise, batches)
            compensator.images = ImagesOf(batches) if calibration is None else calibration
    elif finetune is not None:
        raise PruningError(f'finetune is for layer-wise criteria, but {criterion["type"]} is none')
    _check_data(scorer, batches)
    scorer.prepare(model, candidates, batches, progress)
    scored = score_units(model, candidates, scorer, groups, skipped)
    if automatic:
        groups = _drop_unused(groups, scored)
    if uniform and layerwise is None:
        scored = rank_units(scored, merge)
    # The layers of a unit have the same ranks, of which a sum is no share
    planner = Planner(scored, 'mean' if uniform and merge == 'sum' else merge, min_keep_ratio,
                      round_to)
    sensitivity = None
    if evaluate is not None:
        sensitivity = measure_sensitivity(
            model, planner, groups, evaluate, compensator, progress)
    plan = complete_plan(planner.plan(_decide(
        planner, groups, cost, budget, sensitivity and sensitivity.costs, progress)), units)
    plan.skipped = skipped
    plan.options = dict(
        criterion=dict(criterion), allocation=allocation, ratio=ratio,
        target_params=target_params, target_flops=target_flops, merge=merge,
        min_keep_ratio=min_keep_ratio, round_to=round_to, compensate=compensate,
        input_shape=list(input_shape), sensitivity=sensitivity and asdict(sensitivity))
    if layerwise is None:
        # ranks would make no histogram
        scores = {} if uniform else {group.name: group_scores(scored, group) for group in groups}
        return _finish(model, units, plan, cost, scores, compensator, shape, dry_run,
                       progress)

    plan.options.update(finetune=settings_of(finetune), only_counts=dry_run)
    if dry_run:
        return _finish(model, units, plan, cost, {}, compensator, shape, dry_run, progress)
    layerwise.folded = bool(compensate)
    with restored_on_error(model, weights=True):
        engine = LayerByLayer(model, layerwise, planner, compensator, batches, finetune, progress)
        removed, uncompensated = engine.run(
            order_units(model, units, shape), plan.removed(),
            Unfinished(checkpoint_file, digest_request(plan, batches, model)))
        plan = complete_plan(plan, units, removed)
        result = _finish(model, units, plan, cost, {}, lambda _: uncompensated, shape,
                         dry_run, progress)
    return result


def _finish(model: nn.Module, units: Sequence[ChannelUnit], plan: PruningPlan,
            cost: CostModel, scores: Dict[str, Tensor],
            compensate: Compensate, shape: Sequence[int], dry_run: bool,
            progress: Callable) -> PruningResult:
    """Apply a plan, unless it is a dry run, and say what it leads to."""
    removed = plan.removed()
    result = PruningResult(
        model=model,
        plan=plan,
        channels_before=count_channels(model),
        channels_after=_channels_left(model, units, removed),
        params=[cost.params, cost(removed)[0]],
        macs=[cost.macs, cost(removed)[1]],
        scores=scores,
        uncompensated=[])
    if not dry_run:
        result.uncompensated = _apply(model, units, removed, compensate, shape, progress)
    return result


def _check_data(scorer: Criterion, batches: Optional[Iterable[Batch]]) -> None:
    if scorer.needs and batches is None:
        raise PruningError(f'the criterion {type(scorer).__name__} needs training data, but there '
                           'are none: give batches (--calib-batches of tools/prune.py)')


def _make_groups(model: nn.Module, groups: Groups, ratio: Optional[float],
                 input_shape: Sequence[int]) -> List[LayerGroup]:
    if groups == 'auto':
        groups = auto_groups(model, input_shape)
    elif isinstance(groups, str):
        raise PruningError(f"groups must be 'auto' or a list of layer groups, but is {groups!r}")
    groups = [item if isinstance(item, LayerGroup) else make_group(item) for item in groups]
    if not groups:
        raise PruningError('there are no layer groups: nothing would be pruned')
    if ratio is not None:
        groups = [replace(group, ratio=ratio, threshold=None) for group in groups]
    return groups


def _drop_unused(groups: List[LayerGroup], scored: Sequence[ScoredUnit]) -> List[LayerGroup]:
    used = {name for item in scored for name in item.group_names()}
    return [group for group in groups if group.name in used]


def _decide(planner: Planner, groups: Sequence[LayerGroup], cost: CostModel, budget: Budget,
            costs: Optional[Dict[str, float]], progress: Callable) -> Thresholds:
    """Find the thresholds of all groups."""
    progress('choosing channels', 0, 1)
    thresholds = thresholds_of_groups(planner.scored, groups)
    if budget:
        thresholds = find_thresholds(planner, groups, cost, thresholds, budget, costs)
    elif len(thresholds) < len(groups):
        missing = [group.name for group in groups if group.name not in thresholds]
        raise PruningError(f'layer groups {missing} have neither a ratio nor a threshold, and no '
                           'ratio or budget is given (ratio, target_params, target_flops)')
    progress('choosing channels', 1, 1)
    return thresholds


def _channels_left(model: nn.Module, units: Iterable[ChannelUnit],
                   removed: Dict[str, Tensor]) -> ChannelTable:
    """The channels of all layers after pruning."""
    left = count_channels(model)
    for (name, side), channels in gather_channels(units, removed).items():
        sides = [0, -1] if is_depthwise(find_layer(model, name)) else [0 if side == 'in' else -1]
        for index in sides:
            left[name][index] -= len(channels)
    return left


def _apply(model: nn.Module, units: Sequence[ChannelUnit], removed: Dict[str, Tensor],
           compensate: Compensate, shape: Sequence[int], progress: Callable) -> List[str]:
    """Compensate and remove channels; restore the model if anything goes wrong."""
    with restored_on_error(model):
        progress('compensating', 0, 1)
        uncompensated = compensate(removed)
        progress('compensating', 1, 1)
        with channels_off(model, units, removed):
            expected = raw_predictions(model, shape)
        progress('removing channels', 0, 2)
        remove_channels(model, units, removed)
        progress('removing channels', 1, 2)
        check_same_predictions(expected, _run_pruned(model, shape))
        progress('removing channels', 2, 2)
    return uncompensated


def _run_pruned(model: nn.Module, shape: Sequence[int]) -> List[Tensor]:
    try:
        return raw_predictions(model, shape)
    except Exception as error:  # whatever the model raises
        raise PruningError(f'the pruned model does not run, and has been restored: {error}. Does '
                           'a forward of it depend on channel counts in a way that mmgcp does '
                           'not know? See register_attribute_rule in '
                           'mmgcp/pruning/attributes.py') from error

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What multiples of channels leave of a budget is given back, and which layers are none.

Where only multiples of some number stay, a step of the thresholds takes many channels, perhaps of
several units at once, and more is removed than a budget asks for.
"""
import math
import warnings
from typing import Any, Callable, Dict, Iterable, List, TypeVar

import torch
from torch import Tensor

from mmgcp.errors import UnreachableError

from .budget import Budget
from .cost import CostModel
from .options import BLOCK
from .result import LayerRow
from .scored import ScoredUnit
from .select import MERGES, Limits, Selection, Thresholds, select
from .units import ChannelUnit

Result = TypeVar('Result')


def off_multiples(layers: Iterable[LayerRow], multiple: int) -> List[LayerRow]:
    """List the layers that have lost channels and are left with no multiple of a number."""
    return [row for row in layers if row.after < row.before and row.after % multiple]


def give_back(selection: Selection, thresholds: Thresholds, fixed: Thresholds,
              removed: Dict[str, Tensor], cost: CostModel, budget: Budget) -> Dict[str, Tensor]:
    """Keep more channels, a multiple at a time, as long as the budget is not exceeded.

    The next one is that of the unit whose best channel went last: the one whose score is the
    largest beside its threshold.

    Args:
        selection (Selection): What chose the channels.
        thresholds (Thresholds): Its thresholds.
        fixed (Thresholds): Those that the budget did not decide; units in these groups stay as
            they are.
        removed (dict[str, Tensor]): Channels (K, ) by name of the unit, which are not changed.
        cost (CostModel): What channels cost.
        budget (Budget): The shares that must not be exceeded.

    Returns:
        dict[str, Tensor]: The channels (K, ) that are removed, ascending, by name of the unit.
    """
    found = dict(removed)
    ranks = {item.unit.name: _ranks(selection, item, thresholds) for item in selection.scored
             if item.unit.name in removed and fixed.keys().isdisjoint(item.group_names())}
    units = {item.unit.name: item.unit for item in selection.scored}
    while ranks:
        best = {name: float(values[found[name]].max()) for name, values in ranks.items()}
        name = max(best, key=lambda key: best[key])
        trial = dict(found)
        fewer = _one_more(units[name], ranks[name], trial.pop(name), selection.limits)
        if len(fewer):
            trial[name] = fewer
        if best[name] > -math.inf and budget.allows(*cost.shares(trial)):
            found = trial
            if len(fewer):
                continue
        del ranks[name]
    return found


def _one_more(unit: ChannelUnit, ranks: Tensor, removed: Tensor, limits: Limits) -> Tensor:
    """Return the channels (K, ) to remove if one more stays, and what has to stay with it."""
    margins = torch.full_like(ranks, math.inf)
    margins[removed] = ranks[removed] - ranks[removed].max() - 1
    margins[removed[ranks[removed].argmax()]] = math.inf
    return select(unit, margins.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf),
                  limits)


def _ranks(selection: Selection, item: ScoredUnit, thresholds: Thresholds) -> Tensor:
    """Return by which multiples (C, ) of its thresholds each channel goes; -inf if it is gone."""
    fixed = item.per_layer({name: 0. for name, value in thresholds.items() if value is not None},
                           -math.inf)
    ranks = MERGES[selection.merge].factors(item.all_scores, fixed,
                                            item.per_layer(thresholds, 0.))
    if item.unit.name in selection.gone:
        ranks[selection.gone[item.unit.name]] = -math.inf
    return ranks


def with_default_multiple(run: Callable[..., Result], options: Dict[str, Any]) -> Result:
    """Call a function with options of ``prune()`` that may say nothing of multiples of channels.

    It gets the largest of some with which the budget can be reached: in narrow layers multiples
    of 16 channels leave nothing to remove. A model must be as before where it fails.
    """
    if options.get('round_to') is None:
        for multiple in (BLOCK, BLOCK // 2):
            try:
                return run(**dict(options, round_to=multiple))
            except UnreachableError as error:
                warnings.warn(f'{error} with multiples of {multiple} channels: trying smaller ones',
                              stacklevel=2)
        options = dict(options, round_to=1)
    return run(**options)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The channel units that can be removed, as trying shows, from whatever of a detector is traced.

Detectors whose heads cannot be run or traced, such as those of DETR, lose channels in their
backbones and necks alone. Units whose removal breaks the detector are found by halving.
"""
import warnings
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

import torch
import torch.nn as nn

from mmgcp.errors import PruningError, told
from mmgcp.nn.forward import (
    head_left_out_on_demand,
    is_head_left_out,
    leave_head_out,
    working_shape,
)
from mmgcp.nn.layers import WEIGHT_TYPES
from mmgcp.nn.precision import full_precision
from mmgcp.nn.temporarily import Snapshot

from .graph import PREDICTIONS, TracingError, find_units
from .select import Limits, select
from .surgery import BrokenError, raw_predictions, remove_and_verify
from .units import ChannelUnit

FEATURES = 'its outputs are read by what cannot be traced'


class Prunable(NamedTuple):
    """What can be removed of a detector."""
    units: List[ChannelUnit]
    skipped: Dict[str, str]  # layers that are left alone, with the reason
    shape: Sequence[int]  # (C, H, W) of a small image that the detector runs on


def find_prunable(model: nn.Module, input_shape: Sequence[int]) -> Prunable:
    """Find the channel units of a detector whose removal leaves it intact; change nothing.

    Their channels are removed for a try, with an image of noise. ``input_shape`` is (C, H, W) of
    the images that the detector is meant for. Raises a PruningError if neither the detector nor
    its backbone and neck can be traced. Warns if no channel of a backbone can be removed.
    """
    with head_left_out_on_demand(model):
        return find_prunable_or_leave_head_out(model, input_shape)


@full_precision()
def find_prunable_or_leave_head_out(model: nn.Module, input_shape: Sequence[int]) -> Prunable:
    """Do as :func:`find_prunable`, and leave the head out from now on if it cannot be traced.

    See :func:`mmgcp.nn.forward.leave_head_out`.
    """
    try:
        shape = _running_shape(model, input_shape)
        units, skipped = find_units(model, shape)
    except TracingError as error:
        if not _can_leave_head_out(model):
            raise
        leave_head_out(model)
        try:
            shape = _running_shape(model, input_shape)
            units, skipped = find_units(model, shape)
        except TracingError:
            raise error from None
        skipped = _with_head(model, units, skipped, str(error))
    units = _intact(model, units, skipped, shape)
    _warn_of_backbone(model, units, skipped)
    return Prunable(units, skipped, shape)


def shape_or_leave_head_out(model: nn.Module, input_shape: Sequence[int]) -> Sequence[int]:
    """Return the shape of a small image; leave the head out from now on if it does not run."""
    try:
        return _running_shape(model, input_shape)
    except TracingError:
        if not _can_leave_head_out(model):
            raise
        leave_head_out(model)
        return _running_shape(model, input_shape)


def _can_leave_head_out(model: nn.Module) -> bool:
    return hasattr(model, 'extract_feat') and not is_head_left_out(model)


def _running_shape(model: nn.Module, input_shape: Sequence[int]) -> Sequence[int]:
    """Return the shape of a small image; a TracingError if the detector runs on none."""
    try:
        return working_shape(model, input_shape)
    except Exception as error:  # whatever the model raises
        raise TracingError('the model cannot be run on an image alone: '
                           f'{told(error)}') from error


def _with_head(model: nn.Module, units: Sequence[ChannelUnit], skipped: Dict[str, str],
               reason: str) -> Dict[str, str]:
    """Add the layers of a head that is left out, and why, to those that are left alone."""
    traced = {item.module for unit in units for item in unit.slices}
    found = {name: FEATURES if why == PREDICTIONS else why for name, why in skipped.items()}
    for name, module in model.named_modules():
        if isinstance(module, WEIGHT_TYPES) and name not in traced:
            found.setdefault(name, reason)
    return found


def _intact(model: nn.Module, units: List[ChannelUnit], skipped: Dict[str, str],
            shape: Sequence[int]) -> List[ChannelUnit]:
    """Return the units that can be removed together; others become layers that are skipped."""
    if _fault(model, units, shape) is None:
        return units
    _check_unpruned(model, shape)
    intact: List[ChannelUnit] = []
    pending = [units]
    while pending:
        candidates = pending.pop()
        reason = _fault(model, [*intact, *candidates], shape)
        if reason is None:
            intact.extend(candidates)
        elif len(candidates) > 1:
            middle = len(candidates) // 2
            pending += [candidates[middle:], candidates[:middle]]
        else:
            for item in candidates[0].side('out'):
                skipped.setdefault(item.module, reason)
    names = {unit.name for unit in intact}
    return [unit for unit in units if unit.name in names]


def _check_unpruned(model: nn.Module, shape: Sequence[int]) -> None:
    """Raise a PruningError unless a detector predicts finite values, and the same ones twice."""
    what = None
    if not all(bool(values.isfinite().all()) for values in raw_predictions(model, shape)):
        what = 'predicts values that are not finite'
    elif _fault(model, [], shape) is not None:
        what = 'does not predict the same twice for the same image'
    if what:
        raise PruningError(f'the detector {what}, so that pruning it cannot be checked')


def _warn_of_backbone(model: nn.Module, units: Iterable[ChannelUnit],
                      skipped: Dict[str, str]) -> None:
    """Warn if no channel of a detector's backbone can be removed."""
    backbone = getattr(model, 'backbone', None)
    inside = [name for name, module in model.named_modules()
              if name.startswith('backbone.') and isinstance(module, WEIGHT_TYPES)]
    if inside and not any(item.module.startswith('backbone.')
                          for unit in units for item in unit.side('out')):
        reason = next((f': {skipped[name]}, which is said of {name}' for name in inside
                       if name in skipped), ', as tracing does not see how its layers are read')
        warnings.warn(f'no channel of the backbone ({type(backbone).__name__}) can be '
                      f'removed{reason}', stacklevel=4)


def _fault(model: nn.Module, units: Sequence[ChannelUnit],
           shape: Sequence[int]) -> Optional[str]:
    """Say what is wrong with a model without some channels of units; None if nothing is."""
    removed = {unit.name: _some_channels(unit) for unit in units}
    before = Snapshot(model)
    try:
        remove_and_verify(model, units, removed, shape, lambda *_: None)
    except BrokenError as error:
        return f'it cannot be removed: the model then {error.reason}'
    except Exception as error:  # whatever the model, or correcting its attributes, raises
        return f'it cannot be removed: {told(error)}'
    finally:
        before.restore()
    return None


def _some_channels(unit: ChannelUnit) -> torch.Tensor:
    """Choose about half of the channels (K, ) of a unit, at random but always the same.

    Channels that are normalised together go together, and equally many of each group of a
    convolution go.
    """
    generator = torch.Generator().manual_seed(0)
    if unit.norm_groups is not None:
        return select(unit, _random_ranks(int(unit.norm_groups.max()) + 1,
                                          generator)[unit.norm_groups], Limits())
    ranks = torch.zeros(unit.size, dtype=torch.double)
    groups = torch.zeros(unit.size) if unit.conv_groups is None else unit.conv_groups
    for group in groups.unique():
        members = groups == group
        ranks[members] = _random_ranks(int(members.sum()), generator)
    return select(unit, ranks, Limits())


def _random_ranks(number: int, generator: torch.Generator) -> torch.Tensor:
    """Return different margins (N, ), about half of which are above zero."""
    return (torch.randperm(number, generator=generator) - number // 2).double()

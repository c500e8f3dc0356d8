# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Channel units of a model that has lost some of its channels, and those of the original.

Both have the same names. In the smaller model, the channels that are left are numbered from 0, in
each layer and in each unit, in the order that they have in the original.
"""
import math
from dataclasses import replace
from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor

from .scored import ScoredUnit
from .surgery import Channels, gather_channels
from .units import ChannelSlice, ChannelUnit


def remaining_units(units: Sequence[ChannelUnit], gone: Dict[str, Tensor]) -> List[ChannelUnit]:
    """Return what is left of the units of a model without channels (K, ), by name of the unit."""
    if not gone:
        return list(units)
    lost = {key: channels.sort().values
            for key, channels in gather_channels(units, gone).items()}
    return [_remaining(unit, gone, lost) for unit in units]


def _remaining(unit: ChannelUnit, gone: Dict[str, Tensor], lost: Channels) -> ChannelUnit:
    stays = ~unit.mask(gone.get(unit.name, torch.zeros(0, dtype=torch.long)))
    slices = []
    for item in unit.slices:
        kept = stays[item.unit_index]
        slices.append(ChannelSlice(
            item.module, item.side,
            _renumbered(item.channels[kept], lost.get((item.module, item.side))),
            _renumbered(item.unit_index[kept], gone.get(unit.name))))
    norm_groups = unit.norm_groups
    if norm_groups is not None:
        norm_groups = norm_groups[stays].unique(return_inverse=True)[1]
    conv_groups = None if unit.conv_groups is None else unit.conv_groups[stays]
    return ChannelUnit(unit.name, int(stays.sum()), tuple(slices), norm_groups, conv_groups,
                       unit.branches)


def remaining_channels(removed: Dict[str, Tensor],
                       gone: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Return which channels (K, ) of the smaller model are to be removed, by name of the unit.

    ``removed`` and ``gone`` number the channels of the original; all that are gone are removed.
    """
    found = {}
    for name, channels in removed.items():
        before = gone.get(name, channels[:0])
        channels = channels[~torch.isin(channels, before)]
        if len(channels):
            found[name] = _renumbered(channels, before)
    return found


def with_gone_channels(scored: Sequence[ScoredUnit], units: Sequence[ChannelUnit],
                       gone: Dict[str, Tensor]) -> List[ScoredUnit]:
    """Turn scores of the smaller model into those of the original's units.

    Channels that are gone get -inf in the layers that had them: they are below any threshold.
    """
    if not gone:
        return list(scored)
    originals = {unit.name: unit for unit in units}
    return [_with_gone(item, originals[item.unit.name], gone) for item in scored]


def _with_gone(item: ScoredUnit, unit: ChannelUnit, gone: Dict[str, Tensor]) -> ScoredUnit:
    stays = ~unit.mask(gone.get(unit.name, torch.zeros(0, dtype=torch.long)))
    members = {piece.module: unit.mask(piece.unit_index) for piece in unit.side('out')}
    spread = {}
    for layer, scores in item.scores.items():
        has = members[layer]  # the layer that names the unit has all of its channels
        spread[layer] = torch.full((unit.size, ), -math.inf, dtype=scores.dtype).masked_fill(
            ~has, math.nan)
        spread[layer][stays] = scores
    return replace(item, unit=unit, scores=spread)


def _renumbered(channels: Tensor, lost: Optional[Tensor]) -> Tensor:
    """Subtract from each channel (K, ) how many lower ones are lost, which are ascending."""
    return channels if lost is None else channels - torch.searchsorted(lost, channels)

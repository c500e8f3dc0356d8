# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which channels of a unit can only be removed together, or equally many of each group."""
from dataclasses import replace
from typing import Dict, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import Layer, is_grouped, num_channels

from .units import ChannelSlice, ChannelUnit


def constrain(unit: ChannelUnit, layers: Dict[str, Layer]) -> ChannelUnit:
    """Add the groups that GroupNorms and grouped convolutions require to a unit.

    Args:
        unit (ChannelUnit): The unit.
        layers (dict[str, nn.Module | nn.Parameter]): Its layers by name.

    Returns:
        ChannelUnit: The unit, with ``norm_groups`` or ``conv_groups`` if its layers need them.

    Raises:
        PruningError: No part of the unit can be removed; the message is the reason.
    """
    norms = [item for item in unit.slices if isinstance(layers[item.module], nn.GroupNorm)]
    convs = [item for item in unit.slices if is_grouped(layers[item.module])]
    if norms and convs:
        raise PruningError(f'it is coupled with both the GroupNorm {norms[0].module} and the '
                           f'grouped convolution {convs[0].module}')
    if norms:
        return replace(unit, norm_groups=_norm_groups(unit, norms, layers))
    if convs:
        return replace(unit, conv_groups=_conv_groups(unit, convs, layers))
    return unit


def _norm_groups(unit: ChannelUnit, norms: List[ChannelSlice],
                 layers: Dict[str, Layer]) -> Tensor:
    """Number (C, ) the groups of channels that are linked by what GroupNorms normalise jointly."""
    numbers = torch.arange(unit.size)
    for item in norms:
        norm = layers[item.module]
        size = norm.num_channels // norm.num_groups
        groups = item.channels // size
        if bool((groups.bincount(minlength=norm.num_groups) % size).any()):
            raise PruningError(f'not all channels of a group of the GroupNorm {item.module} are '
                               'coupled with it')
        for group in groups.unique().tolist():
            members = numbers[item.unit_index[groups == group]]
            numbers[torch.isin(numbers, members)] = members.min()
    return numbers.unique(return_inverse=True)[1]


def _conv_groups(unit: ChannelUnit, convs: List[ChannelSlice],
                 layers: Dict[str, Layer]) -> Optional[Tensor]:
    """Number (C, ) the channels by their group in the grouped convolutions, -1 for no group."""
    found = None
    for item in convs:
        conv = layers[item.module]
        channels = num_channels(conv, item.side)
        if len(item.channels.unique()) < channels or len(item.unit_index.unique()) < channels:
            raise PruningError(f'it has only some channels of the grouped convolution '
                               f'{item.module}')
        numbers = torch.full((unit.size, ), -1)
        numbers[item.unit_index] = item.channels // (channels // conv.groups)
        if found is not None and not torch.equal(found, numbers):
            raise PruningError(f'the grouped convolutions {convs[0].module} and {item.module} '
                               'divide its channels differently')
        found = numbers
    return found

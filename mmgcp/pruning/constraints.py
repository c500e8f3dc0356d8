# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which channels of a channel unit have to go together, because of its layers."""
from dataclasses import replace
from typing import Dict, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.layers import Layer, is_grouped, num_channels

from .units import ChannelSlice, ChannelUnit


def constrain(unit: ChannelUnit, layers: Dict[str, Layer]) -> ChannelUnit:
    """Add to a unit the groups that its GroupNorms and grouped convolutions ask for.

    Args:
        unit (ChannelUnit): The unit.
        layers (dict[str, nn.Module | nn.Parameter]): Its layers by name.

    Returns:
        ChannelUnit: The unit, with norm_groups and conv_groups if its layers need them.

    Raises:
        PruningError: No part of the unit can be removed; says why.
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
    """Join the channels that any GroupNorm normalises together."""
    norm_groups = torch.arange(unit.size)
    for item in norms:
        norm = layers[item.module]
        size = norm.num_channels // norm.num_groups
        groups = item.channels // size
        if bool((groups.bincount(minlength=norm.num_groups) % size).any()):
            raise PruningError(f'not all channels of a group of the GroupNorm {item.module} are '
                               'coupled with it')
        for group in groups.unique().tolist():
            members = norm_groups[item.unit_index[groups == group]]
            norm_groups[torch.isin(norm_groups, members)] = members.min()
    return norm_groups.unique(return_inverse=True)[1]


def _conv_groups(unit: ChannelUnit, convs: List[ChannelSlice],
            layers: Dict[str, Layer]) -> Optional[Tensor]:
    """The conv_groups of the grouped convolutions, if they all have the same."""
    found = None
    for item in convs:
        conv = layers[item.module]
        channels = num_channels(conv, item.side)
        if len(item.channels.unique()) < channels or len(item.unit_index.unique()) < channels:
            raise PruningError(f'it has only some channels of the grouped convolution '
                               f'{item.module}')
        conv_groups = torch.full((unit.size, ), -1)
        conv_groups[item.unit_index] = item.channels // (channels // conv.groups)
        if found is not None and not torch.equal(found, conv_groups):
            raise PruningError(f'the grouped convolutions {convs[0].module} and {item.module} '
                               'divide its channels differently')
        found = conv_groups
    return found

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which channels of a coupled set have to go together, because of its layers."""
from dataclasses import replace
from typing import Dict, List, Optional

import torch
import torch.nn as nn
from torch import Tensor

from .layers import Layer, is_grouped, num_channels
from .structures import ChannelSlice, CoupledChannels, PruningError


def constrain(coupled: CoupledChannels, layers: Dict[str, Layer]) -> CoupledChannels:
    """Add the units and blocks that GroupNorms and grouped convolutions ask for to a set.

    Args:
        coupled (CoupledChannels): The set.
        layers (dict[str, nn.Module | nn.Parameter]): Its layers by name.

    Returns:
        CoupledChannels: The set, with units and blocks if its layers need them.

    Raises:
        PruningError: No part of the set can be removed; says why.
    """
    norms = [item for item in coupled.slices if isinstance(layers[item.module], nn.GroupNorm)]
    convs = [item for item in coupled.slices if is_grouped(layers[item.module])]
    if norms and convs:
        raise PruningError(f'it is coupled with both the GroupNorm {norms[0].module} and the '
                           f'grouped convolution {convs[0].module}')
    if norms:
        return replace(coupled, units=_units(coupled, norms, layers))
    if convs:
        return replace(coupled, blocks=_blocks(coupled, convs, layers))
    return coupled


def _units(coupled: CoupledChannels, norms: List[ChannelSlice],
           layers: Dict[str, Layer]) -> Tensor:
    """Join the channels that any GroupNorm normalises together."""
    units = torch.arange(coupled.size)
    for item in norms:
        norm = layers[item.module]
        size = norm.num_channels // norm.num_groups
        groups = item.channels // size
        if bool((groups.bincount(minlength=norm.num_groups) % size).any()):
            raise PruningError(f'not all channels of a group of the GroupNorm {item.module} are '
                               'coupled with it')
        for group in groups.unique().tolist():
            members = units[item.roots[groups == group]]
            units[torch.isin(units, members)] = members.min()
    return units.unique(return_inverse=True)[1]


def _blocks(coupled: CoupledChannels, convs: List[ChannelSlice],
            layers: Dict[str, Layer]) -> Optional[Tensor]:
    """The blocks of the grouped convolutions, if they all have the same."""
    found = None
    for item in convs:
        conv = layers[item.module]
        channels = num_channels(conv, item.side)
        if len(item.channels.unique()) < channels or len(item.roots.unique()) < channels:
            raise PruningError(f'it has only some channels of the grouped convolution '
                               f'{item.module}')
        blocks = torch.full((coupled.size, ), -1)
        blocks[item.roots] = item.channels // (channels // conv.groups)
        if found is not None and not torch.equal(found, blocks):
            raise PruningError(f'the grouped convolutions {convs[0].module} and {item.module} '
                               'divide its channels differently')
        found = blocks
    return found

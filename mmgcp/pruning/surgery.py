# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Removing channels from the layers of a model, in place."""
from typing import Dict, Iterable, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.layers import find_layer, keep_channels, num_channels

from .attributes import refresh_attributes
from .units import ChannelUnit

# (layer name, side) -> channels
Channels = Dict[Tuple[str, str], Tensor]


def remove_channels(model: nn.Module, units: Iterable[ChannelUnit],
                    removed: Dict[str, Tensor]) -> None:
    """Remove channels (K, ), by name of the unit, from all layers that have them.

    The attributes that forward methods read are corrected. Parameters keep their
    ``requires_grad``, modules their mode.
    """
    for (name, side), channels in gather_channels(units, removed).items():
        keep = torch.ones(num_channels(find_layer(model, name), side), dtype=torch.bool)
        keep[channels] = False
        keep_channels(model, name, side, keep.nonzero().flatten())
    refresh_attributes(model)


def gather_channels(units: Iterable[ChannelUnit], removed: Dict[str, Tensor]) -> Channels:
    """Translate channels (K, ) of units, by their names, to the channels of their layers."""
    gathered: Channels = {}
    for unit in units:
        if unit.name not in removed:
            continue
        mask = unit.mask(removed[unit.name])
        for item in unit.slices:
            key = (item.module, item.side)
            channels = item.select(mask)
            gathered[key] = torch.cat((gathered[key], channels)) if key in gathered else channels
    return gathered

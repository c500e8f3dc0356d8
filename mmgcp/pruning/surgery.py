# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Removing channels from the layers of a model, in place."""
from typing import Dict, Iterable, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .attributes import refresh_attributes
from .layers import find_layer, keep_channels, num_channels
from .structures import CoupledChannels

# (layer name, side) -> channels
Channels = Dict[Tuple[str, str], Tensor]


def remove_channels(model: nn.Module, coupled_sets: Iterable[CoupledChannels],
                    removed: Dict[str, Tensor]) -> None:
    """Remove channels of coupled sets from all layers that have them.

    Args:
        model (nn.Module): The model, changed in place. Parameters keep their
            ``requires_grad``, modules their mode. Attributes that forwards read follow.
        coupled_sets (Iterable[CoupledChannels]): The sets.
        removed (dict[str, Tensor]): Channels to remove, by name of the set.
    """
    for (name, side), channels in gather_channels(coupled_sets, removed).items():
        keep = torch.ones(num_channels(find_layer(model, name), side), dtype=torch.bool)
        keep[channels] = False
        keep_channels(model, name, side, keep.nonzero().flatten())
    refresh_attributes(model)


def gather_channels(coupled_sets: Iterable[CoupledChannels],
                    removed: Dict[str, Tensor]) -> Channels:
    """Translate channels of sets to channels of layers.

    Args:
        coupled_sets (Iterable[CoupledChannels]): The sets.
        removed (dict[str, Tensor]): Channels to remove, by name of the set.

    Returns:
        dict: Channels to remove, by name and side of the layer.
    """
    gathered: Channels = {}
    for coupled in coupled_sets:
        if coupled.name not in removed:
            continue
        mask = coupled.mask(removed[coupled.name])
        for item in coupled.slices:
            key = (item.module, item.side)
            channels = item.select(mask)
            gathered[key] = torch.cat((gathered[key], channels)) if key in gathered else channels
    return gathered

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers that read the channels of a channel unit."""
from typing import Dict, List

import torch.nn as nn

from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.pruning.units import ChannelSlice, ChannelUnit


def find_consumers(model: nn.Module, unit: ChannelUnit) -> Dict[str, List[ChannelSlice]]:
    """Find the layers with weights that read the channels of a unit.

    Args:
        model (nn.Module): The model.
        unit (ChannelUnit): The unit.

    Returns:
        dict[str, list[ChannelSlice]]: The slices of each consumer's inputs by its name.
    """
    found: Dict[str, List[ChannelSlice]] = {}
    for item in unit.side('in'):
        if isinstance(find_layer(model, item.module), WEIGHT_TYPES):
            found.setdefault(item.module, []).append(item)
    return found

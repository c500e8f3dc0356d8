# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Taking channels out of a model by hand, without anything of mmgcp."""
import copy

import torch
import torch.nn as nn


@torch.no_grad()
def zero(model, gone):
    """Return a copy whose layers make nothing of channels, and read nothing of them.

    Args:
        model (nn.Module): The model.
        gone (dict): The channels by name and side of the layer; of depthwise convolutions,
            normalisation layers and parameters the side is 'out'.
    """
    model = copy.deepcopy(model)
    for (name, side), channels in gone.items():
        owner, _, attribute = name.rpartition('.')
        layer = getattr(model.get_submodule(owner), attribute)
        if isinstance(layer, nn.Parameter):
            layer.view(-1)[channels] = 0
            continue
        if side == 'out' and layer.bias is not None:
            layer.bias[channels] = 0
        if side == ('in' if isinstance(layer, nn.ConvTranspose2d) else 'out'):
            layer.weight[channels] = 0
        else:
            _zero_within_groups(layer, channels)
    return model


def _zero_within_groups(layer, channels):
    groups = getattr(layer, 'groups', 1)
    others = layer.weight.shape[0] // groups
    for channel in channels:
        group, place = divmod(channel, layer.weight.shape[1])
        layer.weight[group * others:(group + 1) * others, place] = 0

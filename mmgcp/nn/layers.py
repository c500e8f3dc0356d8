# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers whose channels can be removed: counting their channels, and keeping some."""
from typing import List, Union

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError

CONV_TYPES = (nn.Conv2d, nn.ConvTranspose2d)
WEIGHT_TYPES = (*CONV_TYPES, nn.Linear)
NORM_TYPES = (_BatchNorm, nn.GroupNorm)

Layer = Union[nn.Module, nn.Parameter]


def find_layer(model: nn.Module, name: str) -> Layer:
    """Return the module or the parameter of a name."""
    owner, _, attribute = name.rpartition('.')
    return getattr(model.get_submodule(owner), attribute) if name else model


def is_depthwise(layer: Layer) -> bool:
    """Whether a layer is a convolution that filters each channel by itself."""
    return (isinstance(layer, CONV_TYPES) and layer.groups > 1
            and layer.groups == layer.in_channels == layer.out_channels)


def is_grouped(layer: Layer) -> bool:
    """Whether a layer is a convolution in groups of several channels."""
    return isinstance(layer, CONV_TYPES) and layer.groups > 1 and not is_depthwise(layer)


def has_channels(parameter: nn.Parameter) -> bool:
    """Whether a bare parameter has one dimension, that of the channels, beside those of 1."""
    return sum(size > 1 for size in parameter.shape) == 1


def channel_dim(parameter: nn.Parameter) -> int:
    """Return the dimension of the channels in a parameter that has them."""
    return [size > 1 for size in parameter.shape].index(True)


def num_channels(layer: Layer, side: str) -> int:
    """Number of channels that a layer has on a side, ``'in'`` or ``'out'``."""
    return channel_counts(layer)[0 if side == 'in' else -1]


def channel_counts(layer: Layer) -> List[int]:
    """List the numbers of channels of a layer.

    Args:
        layer (nn.Module | nn.Parameter): The layer.

    Returns:
        list[int]: [in, out] of convolutions and linear layers, [features] of
        normalisation layers and parameters with channels; empty for anything else.
    """
    if isinstance(layer, CONV_TYPES):
        return [layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    if isinstance(layer, _BatchNorm):
        return [layer.num_features]
    if isinstance(layer, nn.GroupNorm):
        return [layer.num_channels]
    if isinstance(layer, nn.Parameter) and has_channels(layer):
        return [layer.shape[channel_dim(layer)]]
    return []


def spread_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Give values of a layer's input channels the dimensions of its weight.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer.
        values (Tensor): Values (I, ) of the input channels.

    Returns:
        Tensor: The value of the channel that each weight reads, with dimensions of 1 where it
        is the same for all.
    """
    if isinstance(layer, nn.Linear):
        return values[None]
    if isinstance(layer, nn.ConvTranspose2d):
        return values[:, None, None, None]
    groups = values.view(layer.groups, -1)
    return groups.repeat_interleave(layer.out_channels // layer.groups, 0)[..., None, None]


def keep_channels(model: nn.Module, name: str, side: str, keep: Tensor) -> None:
    """Reduce a layer to some of its channels.

    Args:
        model (nn.Module): The model.
        name (str): Name of the layer in it.
        side (str): ``'out'`` or ``'in'``. Normalisation layers, depthwise convolutions and
            parameters have one kind of channels, ``'out'``.
        keep (Tensor): Indices of the channels that stay, ascending. Of a grouped
            convolution, equally many of each group; of a GroupNorm, whole groups.

    Raises:
        PruningError: The layer is of a type that cannot be reduced.
    """
    layer = find_layer(model, name)
    if isinstance(layer, nn.Parameter):
        owner, _, attribute = name.rpartition('.')
        _select(model.get_submodule(owner), attribute, channel_dim(layer), keep)
    elif isinstance(layer, _BatchNorm):
        for tensor in ('weight', 'bias', 'running_mean', 'running_var'):
            _select(layer, tensor, 0, keep)
        layer.num_features = len(keep)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_groups = len(keep) * layer.num_groups // layer.num_channels
        for tensor in ('weight', 'bias'):
            _select(layer, tensor, 0, keep)
        layer.num_channels = len(keep)
    elif is_depthwise(layer):
        for tensor in ('weight', 'bias'):
            _select(layer, tensor, 0, keep)
        layer.in_channels = layer.out_channels = layer.groups = len(keep)
    elif is_grouped(layer):
        _keep_of_grouped(layer, side, keep)
    elif isinstance(layer, WEIGHT_TYPES):
        transposed = isinstance(layer, nn.ConvTranspose2d)
        _select(layer, 'weight', int((side == 'in') != transposed), keep)
        _set_count(layer, side, keep)
    else:
        raise PruningError(f'cannot remove channels of the {type(layer).__name__} {name}')


def _keep_of_grouped(conv: nn.Module, side: str, keep: Tensor) -> None:
    """Reduce a grouped convolution; its weight numbers one side within the groups."""
    whole_side = 'in' if isinstance(conv, nn.ConvTranspose2d) else 'out'
    if side == whole_side:
        _select(conv, 'weight', 0, keep)
    else:
        size = num_channels(conv, side) // conv.groups
        groups = conv.weight.detach().unflatten(0, (conv.groups, -1))
        keep_of_groups = (keep % size).view(conv.groups, -1).to(groups.device)
        weight = torch.cat([group.index_select(1, kept)
                            for group, kept in zip(groups, keep_of_groups)])
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    _set_count(conv, side, keep)


def _set_count(layer: nn.Module, side: str, keep: Tensor) -> None:
    if side == 'out':
        _select(layer, 'bias', 0, keep)
    unit = 'features' if isinstance(layer, nn.Linear) else 'channels'
    setattr(layer, f'{side}_{unit}', len(keep))


def _select(module: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    """Index a parameter or buffer of a module along a dimension."""
    tensor = getattr(module, name)
    if tensor is None:
        return
    selected = tensor.detach().index_select(dim, keep.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        selected = nn.Parameter(selected, requires_grad=tensor.requires_grad)
    setattr(module, name, selected)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers whose channels can be removed: their channels, views of their weights, surgery."""
from typing import List, Optional, Union

import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError

CONV_TYPES = (nn.Conv2d, nn.ConvTranspose2d)
WEIGHT_TYPES = (*CONV_TYPES, nn.Linear)
NORM_TYPES = (_BatchNorm, nn.GroupNorm)

Layer = Union[nn.Module, nn.Parameter]


def find_layer(model: nn.Module, name: str) -> Layer:
    """Return the module or parameter of that name."""
    owner, _, attribute = name.rpartition('.')
    return getattr(model.get_submodule(owner), attribute) if name else model


def is_depthwise(layer: Layer) -> bool:
    """Whether a layer is a convolution that filters each channel by itself."""
    return (isinstance(layer, CONV_TYPES) and layer.groups > 1
            and layer.groups == layer.in_channels == layer.out_channels)


def is_grouped(layer: Layer) -> bool:
    """Whether a layer is a grouped, but not depthwise convolution."""
    return isinstance(layer, CONV_TYPES) and layer.groups > 1 and not is_depthwise(layer)


def has_channels(parameter: nn.Parameter) -> bool:
    """Whether a bare parameter has a dimension of channels: the only one larger than 1."""
    return sum(size > 1 for size in parameter.shape) == 1


def channel_dim(parameter: nn.Parameter) -> int:
    """Return the dimension of the channels of a parameter that has channels."""
    return [size > 1 for size in parameter.shape].index(True)


def num_channels(layer: Layer, side: str) -> int:
    """Count the channels of a layer on a side, ``'in'`` or ``'out'``."""
    return channel_counts(layer)[0 if side == 'in' else -1]


def channel_counts(layer: Layer) -> List[int]:
    """Count the channels of a layer.

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


def weight_by_output(layer: nn.Module) -> Tensor:
    """View the weight of a layer by its output channels.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer with I inputs
            and O outputs in G groups.

    Returns:
        Tensor: (O, I / G, height, width), or (O, I) of a linear layer.
    """
    transposed = isinstance(layer, nn.ConvTranspose2d)
    return _swap_sides(layer, layer.weight) if transposed else layer.weight


def weight_by_input(layer: nn.Module, tensor: Optional[Tensor] = None) -> Tensor:
    """View the weight of a layer by its input channels.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer with I inputs
            and O outputs in G groups.
        tensor (Tensor, optional): View this instead, which has the shape of the weight, such
            as its gradient. Defaults to None.

    Returns:
        Tensor: (I, O / G, height, width), or (I, O) of a linear layer.
    """
    tensor = layer.weight if tensor is None else tensor
    return tensor if isinstance(layer, nn.ConvTranspose2d) else _swap_sides(layer, tensor)


def spread_inputs(layer: nn.Module, values: Tensor) -> Tensor:
    """Spread values of a layer's input channels over its weight.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer.
        values (Tensor): Values (I, ) of its input channels.

    Returns:
        Tensor: The value of the channel that each weight is multiplied with. It can be
        broadcast to the shape of the weight.
    """
    by_input = values.view(-1, *[1] * (layer.weight.dim() - 1))
    if isinstance(layer, nn.ConvTranspose2d):
        return by_input
    groups = getattr(layer, 'groups', 1)
    outputs = num_channels(layer, 'out') // groups if groups > 1 else 1
    return _swap_sides(layer, by_input.repeat_interleave(outputs, 1))


def _swap_sides(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Turn (A, B / G, ...), with channels A and B on both sides in G groups, to (B, A / G, ...)."""
    groups = getattr(layer, 'groups', 1)
    return tensor.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def keep_channels(model: nn.Module, name: str, side: str, keep: Tensor) -> None:
    """Reduce a layer to some of its channels.

    Args:
        model (nn.Module): The model.
        name (str): Name of the layer in it.
        side (str): ``'out'`` or ``'in'``. Normalisation layers, depthwise convolutions and
            parameters have channels on one side only, ``'out'``.
        keep (Tensor): Ascending indices (K, ) of the channels to keep: for a grouped
            convolution as many of each group, for a GroupNorm whole groups.

    Raises:
        PruningError: Channels of layers of this type cannot be removed.
    """
    layer = find_layer(model, name)
    if isinstance(layer, nn.Parameter):
        owner, _, attribute = name.rpartition('.')
        _select(model.get_submodule(owner), attribute, keep, channel_dim(layer))
    elif isinstance(layer, _BatchNorm):
        _select_all(layer, keep)
        layer.num_features = len(keep)
    elif isinstance(layer, nn.GroupNorm):
        _select_all(layer, keep)
        layer.num_groups = len(keep) * layer.num_groups // layer.num_channels
        layer.num_channels = len(keep)
    elif is_depthwise(layer):
        _select_all(layer, keep)
        layer.in_channels = layer.out_channels = layer.groups = len(keep)
    elif isinstance(layer, WEIGHT_TYPES):
        _keep_of_weight(layer, side, keep)
    else:
        raise PruningError(f'cannot remove channels of the {type(layer).__name__} {name}')


def _keep_of_weight(layer: nn.Module, side: str, keep: Tensor) -> None:
    """Reduce a convolution or linear layer, whose weight has the channels of two sides."""
    if (side == 'in') == isinstance(layer, nn.ConvTranspose2d):
        _select(layer, 'weight', keep)
    else:  # this side is numbered within groups
        weight = _swap_sides(layer, layer.weight.detach())
        weight = _swap_sides(layer, weight.index_select(0, keep.to(weight.device)))
        layer.weight = nn.Parameter(weight.contiguous(), layer.weight.requires_grad)
    if side == 'out':
        _select(layer, 'bias', keep)
    counted = 'features' if isinstance(layer, nn.Linear) else 'channels'
    setattr(layer, f'{side}_{counted}', len(keep))


def _select_all(layer: nn.Module, keep: Tensor) -> None:
    """Select channels of a layer that has them in dimension 0 of all its tensors."""
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        _select(layer, name, keep)


def _select(module: nn.Module, name: str, keep: Tensor, dim: int = 0) -> None:
    """Index a parameter or buffer of a module, if it has it, along a dimension."""
    tensor = getattr(module, name, None)
    if tensor is None:
        return
    selected = tensor.detach().index_select(dim, keep.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        selected = nn.Parameter(selected, requires_grad=tensor.requires_grad)
    setattr(module, name, selected)

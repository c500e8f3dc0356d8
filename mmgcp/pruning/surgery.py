# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Removing channels from the layers of a model, in place."""
from typing import Dict, Iterable, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from .structures import CoupledChannels, PruningError

# (module name, side) -> channels
Channels = Dict[Tuple[str, str], Tensor]


def remove_channels(model: nn.Module, coupled_sets: Iterable[CoupledChannels],
                    removed: Dict[str, Tensor]) -> None:
    """Remove channels of coupled sets from all layers that have them.

    Args:
        model (nn.Module): The model, changed in place. Parameters keep their
            ``requires_grad``, modules their mode.
        coupled_sets (Iterable[CoupledChannels]): The sets.
        removed (dict[str, Tensor]): Channels to remove, by name of the set.
    """
    for (name, side), channels in gather_channels(coupled_sets, removed).items():
        module = model.get_submodule(name)
        keep = torch.ones(num_channels(module, side), dtype=torch.bool)
        keep[channels] = False
        keep_channels(module, side, keep.nonzero().flatten())


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


def keep_channels(module: nn.Module, side: str, keep: Tensor) -> None:
    """Reduce a layer to some of its channels.

    Args:
        module (nn.Module): A convolution, linear or BatchNorm layer.
        side (str): ``'out'`` or ``'in'``.
        keep (Tensor): Indices of the channels that stay, in their new order.

    Raises:
        PruningError: The layer is of a type that cannot be reduced.
    """
    if isinstance(module, _BatchNorm):
        for name in ('weight', 'bias', 'running_mean', 'running_var'):
            _select(module, name, 0, keep)
        module.num_features = len(keep)
    elif isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
        transposed = isinstance(module, nn.ConvTranspose2d)
        _select(module, 'weight', int((side == 'in') != transposed), keep)
        if side == 'out':
            _select(module, 'bias', 0, keep)
        unit = 'features' if isinstance(module, nn.Linear) else 'channels'
        setattr(module, f'{side}_{unit}', len(keep))
    else:
        raise PruningError(f'cannot remove channels of a {type(module).__name__}')


def num_channels(module: nn.Module, side: str) -> int:
    """Number of channels that a layer has on a side, ``'in'`` or ``'out'``."""
    if isinstance(module, _BatchNorm):
        return module.num_features
    return getattr(module, f'{side}_features' if isinstance(module, nn.Linear)
                   else f'{side}_channels')


def _select(module: nn.Module, name: str, dim: int, keep: Tensor) -> None:
    """Index a parameter or buffer of a module along a dimension."""
    tensor = getattr(module, name)
    if tensor is None:
        return
    selected = tensor.detach().index_select(dim, keep.to(tensor.device)).contiguous()
    if isinstance(tensor, nn.Parameter):
        selected = nn.Parameter(selected, requires_grad=tensor.requires_grad)
    setattr(module, name, selected)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, List

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from mmyolo.registry import MODELS as MMYOLO_MODELS

from mmgcp.registry import MODELS

from .structures import PruningError
from .surgery import keep_channels

ChannelTable = Dict[str, List[int]]


@MODELS.register_module()
def PrunedDetector(detector: str, channels: ChannelTable, **kwargs) -> nn.Module:  # noqa: N802
    """Build a pruned detector: an ordinary detector with fewer channels in some layers.

    It is a function that the registry calls like a class: what it returns is of the
    original detector's class, with the original names of parameters.

    Args:
        detector (str): Type of the original detector, as ``'YOLODetector'``.
        channels (dict[str, list[int]]): The channels that are left in the layers that
            were pruned: [in, out] of convolutions and linear layers, [features] of
            normalisation layers.
        **kwargs: The arguments of the original detector.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: The table does not fit the detector.
    """
    model = MMYOLO_MODELS.build(dict(type=detector, **kwargs))
    apply_channel_table(model, channels)
    return model


def count_channels(model: nn.Module) -> ChannelTable:
    """List the channels of all layers of a model; see :func:`PrunedDetector`."""
    counts = {name: _counts(module) for name, module in model.named_modules()}
    return {name: numbers for name, numbers in counts.items() if numbers}


def apply_channel_table(model: nn.Module, table: ChannelTable) -> None:
    """Reduce the layers of a model to the first channels, as many as a table says.

    Args:
        model (nn.Module): The model as its config builds it, changed in place.
        table (dict[str, list[int]]): See :func:`PrunedDetector`.

    Raises:
        PruningError: A layer is missing, of another kind, or has too few channels;
            nothing has been changed.
    """
    modules = dict(model.named_modules())
    for name, counts in table.items():
        if name not in modules:
            raise PruningError(f'the channel table names {name!r}, which the detector does not '
                               'have: is it the architecture that was pruned?')
        present = _counts(modules[name])
        if len(present) != len(counts) or any(a > b for a, b in zip(counts, present)):
            raise PruningError(f'the channel table asks for {list(counts)} channels in {name!r}, '
                               f'but the detector has {present} there')
    for name, counts in table.items():
        sides = ('out', ) if len(counts) == 1 else ('in', 'out')
        for side, count in zip(sides, counts):
            keep_channels(modules[name], side, torch.arange(count))


def _counts(module: nn.Module) -> List[int]:
    """The numbers of channels of a layer; empty for other modules."""
    if isinstance(module, _BatchNorm):
        return [module.num_features]
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return [module.in_channels, module.out_channels]
    if isinstance(module, nn.Linear):
        return [module.in_features, module.out_features]
    return []

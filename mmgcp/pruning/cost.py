# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What channels cost: parameters and multiply-accumulate operations (MACs)."""
from typing import Dict, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import ConvStatistics
from mmgcp.nn.layers import NORM_TYPES, find_layer

from .surgery import gather_channels
from .units import ChannelSlice, ChannelUnit


class CostModel:
    """The parameters and MACs of a pruned model, computed from the channels that are removed.

    Args:
        model (nn.Module): The model before pruning.
        convs (dict[str, ConvStatistics]): See :func:`mmgcp.analysis.record_convs`.
        units (Sequence[ChannelUnit]): Its channel units.

    Attributes:
        params (int): Parameters of the model before pruning.
        macs (int): Its MACs for one image.
    """

    def __init__(self, model: nn.Module, convs: Dict[str, ConvStatistics],
                 units: Sequence[ChannelUnit]):
        self.convs = convs
        self.units = units
        self.params = sum(param.numel() for param in model.parameters())
        self.macs = sum(conv.macs for conv in convs.values())
        # What a channel costs beside the weights of convolutions and linear layers
        self.per_channel: Dict[str, int] = {}
        for unit in units:
            for item in unit.side('out'):
                layer = find_layer(model, item.module)
                if isinstance(layer, nn.Parameter):
                    self.per_channel[item.module] = 1
                elif isinstance(layer, NORM_TYPES):
                    self.per_channel[item.module] = sum(1 for _ in layer.parameters())
                else:
                    self.per_channel[item.module] = int(layer.bias is not None)

    def __call__(self, removed: Dict[str, Tensor]) -> Tuple[int, int]:
        """Compute the parameters and MACs that remain.

        Args:
            removed (dict[str, Tensor]): Channels to remove, by name of the unit.

        Returns:
            tuple[int, int]: Parameters, and MACs for one image.
        """
        counts = {key: len(channels)
                  for key, channels in gather_channels(self.units, removed).items()}
        params, macs = self.params, self.macs
        for name in {name for name, _ in counts}:
            fewer_in, fewer_out = counts.get((name, 'in'), 0), counts.get((name, 'out'), 0)
            params -= fewer_out * self.per_channel.get(name, 0)
            if name in self.convs:
                conv = self.convs[name]
                fewer = conv.weights - conv.pruned(fewer_in, fewer_out).weights
                params -= fewer
                macs -= fewer * conv.positions
        return params, macs

    def shares(self, removed: Dict[str, Tensor]) -> Tuple[float, float]:
        """Compute the shares of the parameters and of the MACs that remain."""
        params, macs = self(removed)
        return params / self.params, macs / self.macs

    def costs(self, unit: ChannelUnit) -> Tuple[float, float]:
        """Compute what a channel of a unit costs, as shares of the model's parameters and MACs."""
        params, macs = 0, 0
        for item in unit.slices:
            channels = len(item.channels)
            params += self.per_channel.get(item.module, 0) * channels * (item.side == 'out')
            if item.module in self.convs:
                conv = self.convs[item.module]
                weights = channels * _weights_per_channel(conv, item)
                params += weights
                macs += weights * conv.positions
        return params / unit.size / self.params, macs / unit.size / self.macs


def _weights_per_channel(conv: ConvStatistics, item: ChannelSlice) -> int:
    return conv.weights // (conv.out_channels if item.side == 'out' else conv.in_channels)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What channels cost, and what is left without them: parameters, MACs, channels of layers."""
from typing import Dict, Optional, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import ConvStatistics
from mmgcp.nn.layers import find_layer

from .channel_table import ChannelTable, count_channels
from .surgery import gather_channels
from .units import ChannelUnit


class CostModel:
    """Computes what is left of a model from the channels that are removed.

    The model is as it was when this was made, whatever has become of it since.

    Attributes:
        params (int): Parameters of the model before pruning.
        macs (int): Its MACs for one image, from the statistics of :func:`record_convs`.
        channels (ChannelTable): The channels of its layers.
        whole (Tuple[int, int]): The parameters and MACs that shares are of: by default its own,
            else those of the model from which blocks have been removed.
    """

    def __init__(self, model: nn.Module, convs: Dict[str, ConvStatistics],
                 units: Sequence[ChannelUnit], whole: Optional[Tuple[int, int]] = None):
        self.convs = convs
        self.units = units
        self.params = sum(param.numel() for param in model.parameters())
        self.macs = sum(conv.macs for conv in convs.values())
        self.channels = count_channels(model)
        self.whole = (self.params, self.macs) if whole is None else whole
        # What a channel costs beside the weights of convolutions and linear layers
        self.per_channel: Dict[str, int] = {}
        for unit in units:
            for item in unit.side('out'):
                layer = find_layer(model, item.module)
                self.per_channel[item.module] = (
                    1 if isinstance(layer, nn.Parameter) else
                    sum(param.dim() == 1 for param in layer.parameters()))

    def __call__(self, removed: Dict[str, Tensor]) -> Tuple[int, int]:
        """Return the parameters and MACs that remain without channels (K, ) of units."""
        counts = self._count(removed)
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

    def channels_left(self, removed: Dict[str, Tensor]) -> ChannelTable:
        """Return the channels of all layers that remain without channels (K, ) of units."""
        counts, left = self._count(removed), {}
        for name, before in self.channels.items():
            fewer_in, fewer_out = counts.get((name, 'in'), 0), counts.get((name, 'out'), 0)
            if name in self.convs:
                conv = self.convs[name].pruned(fewer_in, fewer_out)
                left[name] = [conv.in_channels, conv.out_channels]
            else:
                left[name] = [before[0] - fewer_out]
        return left

    def _count(self, removed: Dict[str, Tensor]) -> Dict[Tuple[str, str], int]:
        return {key: len(channels)
                for key, channels in gather_channels(self.units, removed).items()}

    def shares(self, removed: Dict[str, Tensor]) -> Tuple[float, float]:
        """Return the shares of the parameters and of the MACs that remain."""
        params, macs = self(removed)
        return params / self.whole[0], macs / self.whole[1]

    def costs(self, unit: ChannelUnit) -> Tuple[float, float]:
        """Return what a channel of a unit costs, as shares of the model's parameters and MACs."""
        params, macs = 0, 0
        for item in unit.slices:
            number, outputs = len(item.channels), item.side == 'out'
            params += number * self.per_channel.get(item.module, 0) * outputs
            if item.module in self.convs:
                conv = self.convs[item.module]
                weights = number * (
                    conv.weights // (conv.out_channels if outputs else conv.in_channels))
                params += weights
                macs += weights * conv.positions
        return params / unit.size / self.whole[0], macs / unit.size / self.whole[1]

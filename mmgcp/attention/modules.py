# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Spatial and channel attention (SCA)."""
import math

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.utils.checks import COUNT, checked, number_in

NUM_GROUPS = number_in(1, 4096, integer=True)
INITIAL_SCALE = number_in(0, 1, open_low=True, open_high=True)


class SCAModule(nn.Module):
    """The spatial and channel attention of `CPSCA <https://arxiv.org/abs/2011.03891>`_.

    A feature map is multiplied first by a scale for each of its positions, then by a scale for
    each channel of the result. Training starts with one constant factor, ``initial_scale``, so
    that a trained detector is hardly disturbed: all weights are 0, and the biases are such that
    the spatial and the channel scales are both its square root.

    Args:
        channels (int): Number of channels C.
        num_groups (int): The largest number of channel groups. The groups are equally large and
            have at least two channels each; if that is impossible, there is one group.
            Defaults to 8.
        initial_scale (float): In (0, 1). The closer to 1, the flatter the sigmoid is and the
            more slowly the scales are trained. Defaults to 0.9.

    Raises:
        UserError: A setting is not allowed.
    """

    @checked(channels=COUNT, num_groups=NUM_GROUPS, initial_scale=INITIAL_SCALE)
    def __init__(self, channels: int, num_groups: int = 8, initial_scale: float = 0.9) -> None:
        super().__init__()
        fitting = [number for number in range(1, num_groups + 1)
                   if channels % number == 0 and 2 * number <= channels]
        groups, scale = max(fitting, default=1), math.sqrt(initial_scale)
        self.spatial = SpatialGate(groups, scale)
        self.channel = ChannelGate(channels, groups, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Scale a feature map (N, C, H, W) in its own precision."""
        spatial = self.spatial(x).to(x.dtype).unsqueeze(2)
        x = (x.unflatten(1, (self.spatial.groups, -1)) * spatial).flatten(1, 2)
        return x * self.channel(x).to(x.dtype)[:, :, None, None]


class SpatialGate(nn.Module):
    """Scales for the positions of a feature map, separately for each group of channels.

    At each position, the maximum and the mean over the channels of a group are added. The sum
    is standardised over all positions, multiplied by the group's weight, shifted by its bias,
    and passed through a sigmoid.
    """

    def __init__(self, groups: int, initial_scale: float) -> None:
        super().__init__()
        self.groups = groups
        self.norm = _GroupNorm(groups, groups, _logit(initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scales (N, G, H, W) in (0, 1) for the positions of a map (N, C, H, W)."""
        groups = x.unflatten(1, (self.groups, -1))
        return self.norm(groups.amax(2) + groups.mean(2)).sigmoid()


class ChannelGate(nn.Module):
    """Scales for the channels of a feature map.

    The mean and the maximum over all positions of a channel are each standardised over the
    channels of its group, multiplied by the channel's weight and shifted by its bias. Their sum
    is passed through a sigmoid.
    """

    def __init__(self, channels: int, groups: int, initial_scale: float) -> None:
        super().__init__()
        self.mean_norm = _GroupNorm(groups, channels, _logit(initial_scale) / 2)
        self.max_norm = _GroupNorm(groups, channels, _logit(initial_scale) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scales (N, C) in (0, 1) for the channels of a map (N, C, H, W)."""
        values = x.flatten(2)
        return (self.mean_norm(values.mean(2)) + self.max_norm(values.amax(2))).sigmoid()


class _GroupNorm(nn.GroupNorm):
    """A GroupNorm that also accepts groups of a single value, which become zero.

    It is a module of its own, with parameters called weight and bias, because MMYOLO's
    optimizer constructors find no others.
    """

    def __init__(self, groups: int, channels: int, bias: float) -> None:
        super().__init__(groups, channels)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        # In the precision of the weights, because torch 1.13 takes no other under autocast
        x = x.to(self.weight.dtype)
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _logit(scale: float) -> float:
    return math.log(scale / (1 - scale))

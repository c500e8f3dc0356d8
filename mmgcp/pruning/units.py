# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The data that the steps of pruning hand to each other."""
import math
from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.utils.checks import NAME, PATTERNS, check_value, number_in

RATIO = number_in(0, 1, 'must be in [0, 1)', open_high=True)
THRESHOLD = number_in(-math.inf, text='must be a finite number')


@dataclass(frozen=True)
class ChannelSlice:
    """The channels of one layer that belong to a channel unit.

    Attributes:
        module (str): Name of the module, or of a parameter that is added to or multiplied
            with the channels.
        side (str): ``'out'`` for output channels (also of normalisation layers, depthwise
            convolutions and parameters), ``'in'`` for input channels.
        channels (Tensor): Indices (K, ) of the layer's channels on that side.
        unit_index (Tensor): Index (K, ) in the unit of each of these channels.
    """
    module: str
    side: str
    channels: Tensor
    unit_index: Tensor

    def select(self, mask: Tensor) -> Tensor:
        """Return the layer's channels that belong to the channels of a mask of the unit."""
        return self.channels[mask[self.unit_index]]


@dataclass(frozen=True)
class ChannelUnit:
    """Channels of several layers that can only be removed together.

    Attributes:
        name (str): Name of the layer whose output channels number the unit.
        size (int): Number C of channels of the unit.
        slices (Tuple[ChannelSlice]): Where the channels occur.
        norm_groups (Tensor, optional): Number (C, ) of the group of channels that GroupNorms
            normalise together; only whole groups can be removed.
        conv_groups (Tensor, optional): Number (C, ) of the group of the grouped convolutions;
            the same number of channels has to be removed from each. Channels with -1 are in
            none.
        branches (Tuple[Tuple[str]]): Layers that make one kernel, and have one score; see
            :func:`mmgcp.pruning.branches.find_branches`.
    """
    name: str
    size: int
    slices: Tuple[ChannelSlice, ...]
    norm_groups: Optional[Tensor] = None
    conv_groups: Optional[Tensor] = None
    branches: Tuple[Tuple[str, ...], ...] = ()

    @cached_property
    def parts(self) -> List[Tensor]:
        """The channels (K, ) of each layer that has only some of the unit's."""
        parts = {tuple(item.unit_index.unique().tolist()) for item in self.slices}
        return [torch.tensor(part) for part in sorted(parts) if len(part) < self.size]

    @cached_property
    def portions(self) -> List[Tensor]:
        """All channels, split into those (K, ) that the same layers have."""
        if not self.parts:
            return [torch.arange(self.size)]
        layers = torch.stack([self.mask(part) for part in self.parts])
        portion = layers.unique(dim=1, return_inverse=True)[1]
        return [(portion == number).nonzero().flatten()
                for number in range(int(portion.max()) + 1)]

    def mask(self, channels: Tensor) -> Tensor:
        """Turn indices of the unit's channels into a boolean mask (C, )."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[channels] = True
        return mask

    def side(self, side: str) -> List[ChannelSlice]:
        """Return the slices of one side."""
        return [item for item in self.slices if item.side == side]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share one threshold.

    Attributes:
        name (str): Name of the group.
        modules (Tuple[str]): Patterns of module names with the wildcards of a shell. A pattern
            stands for the modules that it matches and all modules inside of them.
        ratio (float, optional): Share of the group's channels below its threshold, in [0, 1).
        threshold (float, optional): Threshold of the group's scores. A group with neither ratio
            nor threshold leaves it to a budget.

    Raises:
        PruningError: A value is not allowed, or there are both a ratio and a threshold.
    """
    name: str
    modules: Tuple[str, ...]
    ratio: Optional[float] = None
    threshold: Optional[float] = None

    def __post_init__(self):
        check_value('the name of a layer group', self.name, NAME, PruningError)
        where = f'of layer group {self.name!r}'
        check_value(f'modules {where}', self.modules, PATTERNS, PruningError)
        object.__setattr__(self, 'modules', tuple(self.modules))
        if self.ratio is not None and self.threshold is not None:
            raise PruningError(
                f'layer group {self.name!r} has both a ratio and a threshold; give one of them')
        if self.ratio is not None:
            check_value(f'the ratio {where}', self.ratio, RATIO, PruningError)
        if self.threshold is not None:
            check_value(f'the threshold {where}', self.threshold, THRESHOLD, PruningError)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Spatial and channel attention, for a detector while it is trained."""
import math
from contextlib import contextmanager
from typing import Dict, Iterator, Optional

import torch
import torch.nn as nn
from torch import Tensor

ATTRIBUTE = 'sca'  # of a detector with attention
ASIDE = '_sca_aside'  # where the attention is that was taken out of it


class SCAModule(nn.Module):
    """The spatial and channel attention (SCA) of `CPSCA <https://arxiv.org/abs/2011.03891>`_.

    A feature map is multiplied first with the scales of its places, then with the scales that
    its channels get in the result. It starts as one constant factor, ``initial_scale``, so
    that a trained detector remains itself: all weights are 0, and the biases are such that
    the scales of places and of channels are its square root.

    Args:
        channels (int): Number of channels.
        num_groups (int): At most so many groups of channels. They are equally large and have
            at least two channels each, or else there is one group. Defaults to 8.
        initial_scale (float): In (0, 1). The nearer to 1, the flatter is the sigmoid and the
            slower is the training of the scales. Defaults to 0.9.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(self, channels: int, num_groups: int = 8, initial_scale: float = 0.9) -> None:
        if not 0 < initial_scale < 1:
            raise ValueError(f'initial_scale must be in (0, 1), but is {initial_scale}')
        if num_groups < 1:
            raise ValueError(f'num_groups must be at least 1, but is {num_groups}')
        super().__init__()
        fitting = [number for number in range(1, num_groups + 1)
                   if channels % number == 0 and 2 * number <= channels]
        groups, part = max(fitting, default=1), math.sqrt(initial_scale)
        self.spatial = SpatialGate(groups, part)
        self.channel = ChannelGate(channels, groups, part)

    def forward(self, x: Tensor) -> Tensor:
        """Scale a feature map.

        Args:
            x (Tensor): The map (N, C, H, W).

        Returns:
            Tensor: The scaled map (N, C, H, W), of the same precision.
        """
        places = self.spatial(x).to(x.dtype).unsqueeze(2)
        x = (x.unflatten(1, (self.spatial.groups, -1)) * places).flatten(1, 2)
        return x * self.channel(x).to(x.dtype)[:, :, None, None]


class SpatialGate(nn.Module):
    """Scales of the places of a feature map, for each group of channels.

    The sum of the largest and of the mean value of the group's channels at a place is
    standardised over all places, passed through the group's weight and bias, and through a
    sigmoid.

    Args:
        groups (int): Number of groups.
        initial_scale (float): Scale before any training.
    """

    def __init__(self, groups: int, initial_scale: float) -> None:
        super().__init__()
        self.groups = groups
        self.norm = _GroupNorm(groups, groups, _logit(initial_scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return the scales (N, G, H, W) in (0, 1) of the places of a map (N, C, H, W)."""
        parts = x.unflatten(1, (self.groups, -1))
        return self.norm(parts.amax(2) + parts.mean(2)).sigmoid()


class ChannelGate(nn.Module):
    """Scales of the channels of a feature map.

    The mean and the largest value of each channel are standardised over the channels of its
    group, each passed through the channel's weight and bias, added, and passed through a
    sigmoid.

    Args:
        channels (int): Number of channels.
        groups (int): Number of groups.
        initial_scale (float): Scale before any training.
    """

    def __init__(self, channels: int, groups: int, initial_scale: float) -> None:
        super().__init__()
        self.mean_norm = _GroupNorm(groups, channels, _logit(initial_scale) / 2)
        self.max_norm = _GroupNorm(groups, channels, _logit(initial_scale) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scales (N, C) in (0, 1) of the channels of a map (N, C, H, W)."""
        values = x.flatten(2)
        return (self.mean_norm(values.mean(2)) + self.max_norm(values.amax(2))).sigmoid()


class _GroupNorm(nn.GroupNorm):
    """Also for groups of a single value, which it makes zero.

    Its parameters are called weight and bias in a module of their own: MMYOLO's optimizers
    do not find others.
    """

    def __init__(self, groups: int, channels: int, bias: float) -> None:
        super().__init__(groups, channels)
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


class InsertedAttention(nn.ModuleDict):
    """The attention modules of a detector, each behind one of its blocks.

    It is a child of the detector, called ``sca``, and scales what the blocks return by
    forward hooks, so that nothing of the detector has another name or class. Hooks follow
    copies of the detector, and blocks that are replaced, as where BatchNorm is converted to
    SyncBatchNorm, get them again.

    Attributes:
        producers (Dict[str, str]): Name of the layer whose channels a block returns, by name
            of the block.

    Args:
        producers (dict[str, str]): The same.
        channels (dict[str, int]): Number of channels by name of the block.
        num_groups, initial_scale: See :class:`SCAModule`.
    """

    def __init__(self, producers: Dict[str, str], channels: Dict[str, int], num_groups: int = 8,
                 initial_scale: float = 0.9) -> None:
        super().__init__({_key(block): SCAModule(channels[block], num_groups, initial_scale)
                          for block in producers})
        self.producers = dict(producers)
        self._insertions: Dict[str, _Insertion] = {}
        self._refreshing = None

    def of_block(self, block: str) -> SCAModule:
        """Return the attention behind a block."""
        return self[_key(block)]

    def insert(self, detector: nn.Module) -> None:
        """Become a part of a detector."""
        detector.add_module(ATTRIBUTE, self)
        self._insertions = {block: _Insertion(self.of_block(block), detector.get_submodule(block))
                            for block in self.producers}
        self._refreshing = detector.register_forward_pre_hook(self._refresh)

    def take_out(self, detector: nn.Module) -> None:
        """Leave a detector as it was before."""
        delattr(detector, ATTRIBUTE)
        for insertion in self._insertions.values():
            insertion.handle.remove()
        self._refreshing.remove()
        self._insertions, self._refreshing = {}, None

    def _refresh(self, detector: nn.Module, args: tuple) -> None:
        """Follow blocks that have been replaced."""
        for name, insertion in self._insertions.items():
            block = detector.get_submodule(name)
            if block is not insertion.block:
                insertion.attach(block)


class _Insertion:
    """A forward hook with its attention; an object, so that copies of both belong together."""

    def __init__(self, attention: SCAModule, block: nn.Module) -> None:
        self.attention = attention
        self.attach(block)

    def attach(self, block: nn.Module) -> None:
        self.block = block
        self.handle = block.register_forward_hook(self)

    def __call__(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.attention(output)


def _key(block: str) -> str:
    return block.replace('.', '-')  # names of modules have no dots


def find_attention(detector: nn.Module) -> Optional[InsertedAttention]:
    """Return the attention of a detector, also if it is set aside; None if there is none."""
    attention = getattr(detector, ATTRIBUTE, None)
    return attention if isinstance(attention, InsertedAttention) else detector.__dict__.get(ASIDE)


def is_aside(detector: nn.Module) -> bool:
    """Whether a detector has attention that is set aside."""
    return ASIDE in detector.__dict__


def set_aside(detector: nn.Module) -> Optional[InsertedAttention]:
    """Take the attention out of a detector; :func:`find_attention` still finds it.

    Args:
        detector (nn.Module): The detector. It has the modules, parameters and state dict of
            an ordinary one then.

    Returns:
        InsertedAttention | None: The attention, if there was any.
    """
    attention = getattr(detector, ATTRIBUTE, None)
    if not isinstance(attention, InsertedAttention):
        return None
    attention.take_out(detector)
    detector.__dict__[ASIDE] = attention
    return attention


def forget_aside(detector: nn.Module) -> None:
    """Drop the attention that is set aside."""
    detector.__dict__.pop(ASIDE, None)


@contextmanager
def inserted(detector: nn.Module) -> Iterator[None]:
    """Put attention that is set aside back for a while."""
    attention = detector.__dict__.get(ASIDE)
    if attention is None:
        yield
        return
    attention.insert(detector)
    try:
        yield
    finally:
        attention.take_out(detector)


@contextmanager
def taken_out(detector: nn.Module) -> Iterator[None]:
    """Take attention out of a detector for a while, to look at the detector's own structure."""
    attention = getattr(detector, ATTRIBUTE, None)
    if not isinstance(attention, InsertedAttention):
        yield
        return
    attention.take_out(detector)
    try:
        yield
    finally:
        attention.insert(detector)

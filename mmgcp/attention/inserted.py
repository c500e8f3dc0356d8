# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The attention of a detector: putting it in and taking it out."""
from contextlib import contextmanager
from typing import Dict, Iterator, Optional

import torch.nn as nn
from torch import Tensor

from mmgcp.nn.temporarily import Snapshot

from .modules import SCAModule

ATTRIBUTE = 'sca'  # of a detector with attention
ASIDE = '_sca_aside'  # of a detector whose attention has been taken out for a while


class InsertedAttention(nn.ModuleDict):
    """The attention modules of a detector, each behind one of its blocks.

    It becomes a child of the detector called ``sca`` and scales the outputs of the blocks in
    forward hooks, so that all modules of the detector keep their names and classes. Copies of
    the detector have attention of their own. Blocks that are replaced later, for example where
    BatchNorm is converted to SyncBatchNorm, are followed.

    Args:
        producers (dict[str, str]): For each block the name of the layer that produces the
            channels of its output.
        channels (dict[str, int]): The number of these channels for each block.
        num_groups, initial_scale: See :class:`SCAModule`.

    Attributes:
        producers (dict[str, str]): As given.
    """
    training_only = 'use `with mmgcp.attention.attention_aside(model):`'

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

    def is_in(self, detector: nn.Module) -> bool:
        """Whether it is a part of a detector at the moment."""
        return getattr(detector, ATTRIBUTE, None) is self

    def insert(self, detector: nn.Module) -> None:
        """Become a part of a detector."""
        detector.add_module(ATTRIBUTE, self)
        self._insertions = {block: _Insertion(self.of_block(block), detector.get_submodule(block))
                            for block in self.producers}
        self._refreshing = detector.register_forward_pre_hook(self._refresh)

    def take_out(self, detector: nn.Module) -> None:
        """Leave a detector as it was before :meth:`insert`."""
        delattr(detector, ATTRIBUTE)
        for insertion in self._insertions.values():
            insertion.handle.remove()
        self._refreshing.remove()
        self._insertions, self._refreshing = {}, None

    def _refresh(self, detector: nn.Module, args: tuple) -> None:
        """Attach to blocks that have been replaced."""
        for name, insertion in self._insertions.items():
            block = detector.get_submodule(name)
            if block is not insertion.block:
                insertion.attach(block)


class _Insertion:
    """A forward hook that is an object, so that copies of it run copies of the attention."""

    def __init__(self, attention: SCAModule, block: nn.Module) -> None:
        self.attention = attention
        self.attach(block)

    def attach(self, block: nn.Module) -> None:
        self.block = block
        self.handle = block.register_forward_hook(self)

    def __call__(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return self.attention(output)


def _key(block: str) -> str:
    return block.replace('.', '-')  # the names of modules have no dots


def find_attention(detector: nn.Module) -> Optional[InsertedAttention]:
    """Return the attention of a detector, in place or set aside; None if there is none."""
    attention = getattr(detector, ATTRIBUTE, None)
    return attention if isinstance(attention, InsertedAttention) else vars(detector).get(ASIDE)


@contextmanager
def attention_aside(detector: nn.Module, put_back: bool = False) -> Iterator[None]:
    """Take the attention out of a detector to prune it or to look at its structure.

    .. code-block:: python

        with attention_aside(model):
            prune(model, criterion=dict(type='mmgcp.CPSCA'), batches=batches, ...)

    Meanwhile the detector has the modules, parameters and state dict of the plain one, and
    :func:`find_attention` still finds the attention. In the end the attention is dropped. After
    an error the detector gets it back and is as it was before. Detectors without attention are
    left alone.

    Args:
        detector (nn.Module): The detector.
        put_back (bool): Whether to restore the detector in any case, for example for a dry run
            of :func:`mmgcp.pruning.prune`. Defaults to False.
    """
    attention = find_attention(detector)
    if attention is None or not attention.is_in(detector):
        yield
        return
    attention.take_out(detector)
    snapshot = Snapshot(detector)
    vars(detector)[ASIDE] = attention  # not an attribute by setattr: no module of the detector
    try:
        yield
    except BaseException:
        put_back = True
        raise
    finally:
        del vars(detector)[ASIDE]
        if put_back:
            snapshot.restore()
            attention.insert(detector)


@contextmanager
def attention_in_place(detector: nn.Module) -> Iterator[None]:
    """Put attention that is set aside back for a while."""
    attention = find_attention(detector)
    if attention is None or attention.is_in(detector):
        yield
        return
    attention.insert(detector)
    try:
        yield
    finally:
        attention.take_out(detector)

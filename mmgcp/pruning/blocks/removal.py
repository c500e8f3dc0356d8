# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Computing without blocks, and removing them in place."""
from contextlib import contextmanager
from functools import partial
from typing import Dict, Iterator, List, Optional, Sequence

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.temporarily import Snapshot
from mmgcp.pruning.surgery import BrokenError, check_same_predictions, raw_predictions

# Names of removed blocks, each with the name of its parameter that stays, which scales the shortcut
AbsentBlocks = Dict[str, Optional[str]]


class ScaledShortcut(nn.Module):
    """What is left of a removed block whose shortcut scales what the block reads.

    The scale keeps its name, so that state dicts do, too.

    Args:
        name (str): Name of the parameter, such as 'alpha'.
        scale (nn.Parameter): The parameter, which has one element.
    """

    def __init__(self, name: str, scale: nn.Parameter):
        super().__init__()
        self.name = name
        self.register_parameter(name, scale)

    def forward(self, x: Tensor) -> Tensor:
        """Scale a feature map (N, C, H, W)."""
        return getattr(self, self.name) * x


def remove_blocks(model: nn.Module, absent: AbsentBlocks) -> None:
    """Replace blocks by their shortcuts, so that all other modules keep their names.

    Args:
        model (nn.Module): The model, changed in place.
        absent (dict[str, str | None]): Names of blocks, each with the name of the parameter that
            scales its shortcut, None if there is none.

    Raises:
        PruningError: The model has no such module or parameter; nothing has been changed.
    """
    modules = dict(model.named_modules())
    for name, scale in absent.items():
        if name not in modules or not name:
            raise PruningError(f'the detector has no block {name!r} that could be absent: is it '
                               'the architecture that was pruned?')
        if scale is not None and scale not in modules[name]._parameters:
            raise PruningError(f'the block {name!r} has no parameter {scale!r} that could scale '
                               'its shortcut: is it the architecture that was pruned?')
    for name, scale in absent.items():
        block = modules[name]
        shortcut = nn.Identity() if scale is None else ScaledShortcut(
            scale, block._parameters[scale])
        owner, _, child = name.rpartition('.')
        modules[owner]._modules[child] = shortcut.train(block.training)


@contextmanager
def blocks_off(model: nn.Module, absent: AbsentBlocks) -> Iterator[None]:
    """Let blocks emit what their shortcuts do, without removing them."""
    modules = dict(model.named_modules())
    with on_outputs(model, {
            name: partial(_shortcut, None if scale is None else modules[name]._parameters[scale])
            for name, scale in absent.items()}):
        yield


def _shortcut(scale: Optional[Tensor], inputs: Tensor, _: Tensor) -> Tensor:
    return inputs.clone() if scale is None else scale * inputs


def remove_blocks_and_verify(model: nn.Module, absent: AbsentBlocks,
                             shape: Sequence[int]) -> None:
    """Remove blocks, and check with an image (C, H, W) of noise that this is all that changes.

    Raises a BrokenError if the model does not compute what it does with the blocks off, and then
    restores it.
    """
    before = Snapshot(model)
    with blocks_off(model, absent):
        expected = raw_predictions(model, shape)
    remove_blocks(model, absent)
    try:
        check_same_predictions(expected, _predictions(model, shape))
    except PruningError:
        before.restore()
        raise


def _predictions(model: nn.Module, shape: Sequence[int]) -> List[Tensor]:
    try:
        return raw_predictions(model, shape)
    except Exception as error:  # whatever the model raises
        reason = str(error) or type(error).__name__
        raise BrokenError(f'the model does not run without the removed blocks, and has been '
                          f'restored: {reason}', f'does not run: {reason}') from error

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Computing without channels, removing them in place, and comparing predictions."""
import copy
from contextlib import contextmanager
from functools import partial
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.finite import first_not_finite
from mmgcp.nn.forward import flatten_tensors, run_on_noise
from mmgcp.nn.hooks import on_inputs, on_outputs
from mmgcp.nn.layers import Layer, find_layer, is_depthwise, keep_channels, num_channels
from mmgcp.nn.temporarily import Snapshot
from mmgcp.utils.finite import describe_not_finite

from .attributes import refresh_attributes
from .scores.base import Progress
from .units import ChannelUnit

# (layer name, side) -> channels
Channels = Dict[Tuple[str, str], Tensor]
HINT = ('Does a forward of it depend on channel counts in a way that mmgcp does not know? See '
        'register_attribute_rule in mmgcp/pruning/attributes.py')


class BrokenError(PruningError):
    """A model that does not do without channels what it should; ``reason`` says it in short."""

    def __init__(self, message: str, reason: str):
        super().__init__(f'{message}. {HINT}')
        self.reason = reason


def remove_channels(model: nn.Module, units: Iterable[ChannelUnit],
                    removed: Dict[str, Tensor]) -> None:
    """Remove channels (K, ), by name of the unit, from all layers that have them.

    The attributes that forward methods read are corrected. Parameters keep their
    ``requires_grad``, modules their mode.
    """
    for (name, side), channels in gather_channels(units, removed).items():
        if not len(channels):
            continue
        keep = mask_without(find_layer(model, name), side, channels)
        keep_channels(model, name, side, keep.nonzero().flatten())
    refresh_attributes(model)


def mask_without(layer: Layer, side: str, channels: Tensor) -> Tensor:
    """Return a mask (C, ) of the channels of a layer on a side, without some (K, )."""
    mask = torch.ones(num_channels(layer, side), dtype=torch.bool)
    mask[channels] = False
    return mask


def stays_of(layer: nn.Module, name: str, side: str, removed: Channels) -> Tensor:
    """Return a mask (C, ) of what a layer has left on a side.

    A depthwise convolution has channels on one side, 'out', which it reads, too.
    """
    gone = removed.get((name, 'out' if is_depthwise(layer) else side))
    return mask_without(layer, side, torch.zeros(0, dtype=torch.long) if gone is None else gone)


def gather_channels(units: Iterable[ChannelUnit], removed: Dict[str, Tensor]) -> Channels:
    """Translate channels (K, ) of units, by their names, to the channels of their layers."""
    gathered: Channels = {}
    for unit in units:
        if unit.name not in removed:
            continue
        mask = unit.mask(removed[unit.name])
        for item in unit.slices:
            key = (item.module, item.side)
            channels = item.select(mask)
            gathered[key] = torch.cat((gathered[key], channels)) if key in gathered else channels
    return gathered


@contextmanager
def channels_off(model: nn.Module, units: Iterable[ChannelUnit],
                 removed: Dict[str, Tensor]) -> Iterator[None]:
    """Set channels (K, ), by name of the unit, to zero in all their producers and consumers."""
    inputs, outputs = {}, {}
    for (name, side), channels in gather_channels(units, removed).items():
        layer = find_layer(model, name)
        if isinstance(layer, nn.Parameter):
            continue  # consumers of the sum or product set these channels to zero
        dim = -1 if isinstance(layer, nn.Linear) else 1
        if side == 'in':
            inputs[name] = partial(_zero_input, dim, channels)
        else:
            outputs[name] = partial(_zero_output, dim, channels)
    with on_inputs(model, inputs), on_outputs(model, outputs):
        yield


def _zero_input(dim: int, channels: Tensor, inputs: Tensor) -> Tensor:
    return inputs.index_fill(dim, channels.to(inputs.device), 0)


def _zero_output(dim: int, channels: Tensor, _: Tensor, output: Tensor) -> Tensor:
    return output.index_fill_(dim, channels.to(output.device), 0)  # nobody else has it yet


def raw_predictions(model: nn.Module, shape: Sequence[int]) -> List[Tensor]:
    """Run a model in eval mode on an image of noise (C, H, W) and list its raw predictions."""
    return flatten_tensors(run_on_noise(model, shape))


def check_finite(model: nn.Module, problem: str, shape: Optional[Sequence[int]] = None) -> None:
    """Raise a PruningError if weights or statistics, or predictions on noise, are not finite.

    Predictions are looked at if the shape (C, H, W) of an image is given. The message begins with
    the problem and names the layer.
    """
    found = describe_not_finite(model)
    if not found and shape is not None:
        layer = first_not_finite(model, shape)
        found = layer and f'{layer} emits values that are not finite'
    if found:
        raise PruningError(f'{problem}: {found}')


def check_same_predictions(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Raise a PruningError unless predictions are the same up to rounding errors."""
    same = len(expected) == len(found)
    for before, after in zip(expected, found):
        scale = 1 + float(before.abs().nan_to_num(posinf=0).max()) if before.numel() else 1.
        error = max(1e-3, 10 * torch.finfo(before.dtype).eps)  # more in half precision
        same = same and before.shape == after.shape and torch.allclose(
            before, after, rtol=0, atol=error * scale, equal_nan=True)
    if not same:
        raise BrokenError('the pruned model does not compute what the original does without '
                          'the removed channels, and has been restored',
                          'does not compute what the original does without these channels')


def remove_and_verify(model: nn.Module, units: Sequence[ChannelUnit], removed: Dict[str, Tensor],
                      shape: Sequence[int], progress: Progress) -> None:
    """Remove channels, and check with an image (C, H, W) of noise that this is all that changes.

    Raises a BrokenError if the model does not compute what it does without the channels.
    """
    before = Snapshot(model)
    with channels_off(model, units, removed):
        expected = raw_predictions(model, shape)
    if not all(bool(values.isfinite().all()) for values in expected):
        raise PruningError('without the removed channels the model predicts values that are not '
                           'finite, so it has been restored')
    progress('removing channels', 0, 2)
    remove_channels(model, units, removed)
    progress('removing channels', 1, 2)
    try:
        found = raw_predictions(model, shape)
    except Exception as error:  # whatever the model raises
        reason = str(error) or type(error).__name__
        raise BrokenError(
            f'the pruned model does not run, and has been restored: {reason}',
            f'does not run: {reason}') from error
    try:
        check_same_predictions(expected, found)
    except PruningError:
        if not _same_in_double(model, before, units, removed, shape):
            raise
    progress('removing channels', 2, 2)


def _same_in_double(model: nn.Module, before: Snapshot, units: Sequence[ChannelUnit],
                    removed: Dict[str, Tensor], shape: Sequence[int]) -> bool:
    """Whether a pruned model computes what it did before, without the channels, in double.

    Where a detector compares values, as SOLO's suppression of points does, a rounding error can
    change what it emits. Not all detectors run in double precision; those are not the same.
    """
    try:
        found = raw_predictions(copy.deepcopy(model).double(), shape)
    except Exception:  # whatever the model raises
        return False
    before.restore()
    try:
        original = copy.deepcopy(model).double()
        with channels_off(original, units, removed):
            expected = raw_predictions(original, shape)
        check_same_predictions(expected, found)
    except Exception:
        return False
    finally:
        remove_channels(model, units, removed)
    return True

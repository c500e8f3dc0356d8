# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reconstruction: layers that read removed channels are fitted to what they computed before.

The original and the changed model run side by side on images. In the order of execution each
layer, from the first one on that reads removed channels, gets the weights with which it estimates
its original outputs from its new inputs best (arXiv 1707.06168, asymmetric reconstruction): what
earlier layers could not restore, later ones make up for. The offset goes to the running mean of
the BatchNorms that follow, or to the bias.
"""
from collections import Counter
from functools import partial
from itertools import count
from typing import Dict, Hashable, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import Call, Calls, recording_calls
from mmgcp.nn.distributed import from_first_rank, numbered, total_over_ranks
from mmgcp.nn.forward import random_image, run_as_tensors
from mmgcp.nn.hooks import on_inputs
from mmgcp.nn.layers import WEIGHT_TYPES, is_depthwise, num_channels
from mmgcp.nn.sampling import Places, draw_places
from mmgcp.nn.temporarily import eval_mode
from mmgcp.pruning.surgery import Channels, channels_off, gather_channels
from mmgcp.pruning.units import ChannelUnit

from .layer_fits import LayerFit, make_fit

# Places of an image that each layer is fitted at
PLACES = 256
RIDGE = 1e-2
# Images run together, if they have so many pixels in all at most: memory grows with it
ROUND_IMAGES, ROUND_PIXELS = 32, 32 * 416**2


@torch.no_grad()
def reconstruct(model: nn.Module, units: Sequence[ChannelUnit], removed: Dict[str, Tensor],
                images: Iterable[Tensor], shape: Sequence[int], reference: nn.Module,
                ridge: float = RIDGE) -> List[str]:
    """Fit a model that is about to lose channels to a copy of the original, in place.

    Images come in batches (N, C, H, W), which are joined to rounds: in each, a layer is fitted to
    the samples of all rounds so far before it computes, so that later ones see the inputs that
    they will have. Memory does not grow with their number. Layers that run several times for an
    image, as in heads that levels share, are fitted to all of these runs after each round.

    Args:
        model (nn.Module): The model.
        units (Sequence[ChannelUnit]): Its channel units.
        removed (Dict[str, Tensor]): Channels (K, ) to remove by name of the unit.
        images (Iterable[Tensor]): Of several processes, each has its own.
        shape (Sequence[int]): Shape (C, H, W) of an image that the model runs on.
        reference (nn.Module): The original model.
        ridge (float): See :class:`LeastSquares`. Defaults to 0.01.

    Returns:
        List[str]: Layers that have neither a BatchNorm of their own nor a bias for an offset.

    Raises:
        PruningError: There are no images.
    """
    found = _Reconstruction(model, reference, gather_channels(units, removed), ridge)
    with eval_mode(model), eval_mode(reference), channels_off(model, units, removed):
        for numbers, batch in _rounds(images):
            if batch is None:  # other ranks have images in this round
                batch = random_image(model, shape)
            found.round(numbers, batch.to(next(model.parameters())))
    if not found.fits:
        raise PruningError('there are no images to calibrate with')
    return [name for name, keys in found.keys.items() if None in keys and name in found.readers]


class _Reconstruction:
    """A model and its original while layers are fitted."""

    def __init__(self, model: nn.Module, reference: nn.Module, channels: Channels, ridge: float):
        self.model, self.reference, self.channels, self.ridge = model, reference, channels, ridge
        self.readers = {name for name, side in channels if side == 'in'}
        self.names = [name for name, module in model.named_modules()
                      if isinstance(module, WEIGHT_TYPES)]
        self.fits: Dict[str, LayerFit] = {}  # in the order of execution
        self.keys: Dict[str, List[Hashable]] = {}  # what absorbs the offset of each run
        self.numbers: List[int] = []  # of the images of this round
        self.places: Dict[Sequence[int], Places] = {}  # in this round, by (N, H, W)

    def round(self, numbers: List[int], images: Tensor) -> None:
        """Fit all layers to more images (N, C, H, W); without numbers they do not count."""
        self.numbers, self.places = numbers, {}
        notes = {name: partial(self._see_original, name) for name in self.names}
        with recording_calls(self.reference, notes) as calls:
            run_as_tensors(self.reference, images)
        self.keys = self.keys or {name: keys for name, keys in _absorbers(
            self.reference, calls).items() if name in self.fits}
        runs = {name: iter(zip(keys, calls[name])) for name, keys in self.keys.items()}
        with on_inputs(self.model, {name: partial(self._see_changed, name, found)
                                    for name, found in runs.items()}):
            run_as_tensors(self.model, images)
        for name, keys in self.keys.items():
            if len(keys) > 1:
                self._apply(name)

    def _see_original(self, name: str, inputs: Tensor, output: Tensor
                      ) -> Optional[Tuple[Places, Tensor]]:
        """Return samples of a layer to estimate, if layers from it on are to be fitted."""
        if name not in self.fits:
            if not self.fits and name not in self.readers:
                return None
            self.fits[name] = self._make_fit(name)
        return self.fits[name].targets(inputs, output, self._choose)

    def _see_changed(self, name: str, runs: Iterator[Tuple[Hashable, Call]],
                     inputs: Tensor) -> None:
        """Add samples of a run of a layer, and fit it right away if that is its only run."""
        key, call = next(runs)
        if self.numbers:
            self.fits[name].add(inputs, *call.note, key)
        if len(self.keys[name]) == 1:
            self._apply(name)

    def _apply(self, name: str) -> None:
        """Fit a layer to all samples so far."""
        for key, offset in self.fits[name].apply().items():
            if key == ():
                layer, original = self.fits[name].layer, self.fits[name].original
                layer.bias.copy_(original.bias + offset)
            for norm in key:
                original = self.reference.get_submodule(norm).running_mean
                if original is not None:  # else it subtracts the mean of its inputs
                    self.model.get_submodule(norm).running_mean.copy_(original - offset)

    def _make_fit(self, name: str) -> LayerFit:
        layer, stays = self.model.get_submodule(name), {}
        for side in ('in', 'out'):
            gone = self.channels.get((name, 'out' if is_depthwise(layer) else side), [])
            stays[side] = torch.ones(num_channels(layer, side), dtype=torch.bool)
            stays[side][gone] = False
            stays[side] = stays[side].to(layer.weight.device)
        return make_fit(layer, self.reference.get_submodule(name), stays['in'], stays['out'],
                        self.ridge)

    def _choose(self, maps: Tensor) -> Places:
        """Choose places of feature maps (N, H, W, C), by the number of the image."""
        size = tuple(maps.shape[:3])
        if size not in self.places:
            self.places[size] = draw_places(maps, self.numbers, PLACES)
        return self.places[size]


def _absorbers(model: nn.Module, calls: Calls) -> Dict[str, List[Hashable]]:
    """Find what can absorb an offset of each run of layers.

    That is the names of the BatchNorms that follow, if they follow nothing else; else () for the
    bias, or None if there is none.
    """
    norms = {name: [tuple(call.norms) for call in found] for name, found in calls.items()}
    uses = Counter(norm for found in norms.values() for run in set(found) for norm in run)
    shared = {*calls.foreign, *(norm for norm, number in uses.items() if number > 1)}
    keys = {}
    for name, found in norms.items():
        if not all(run and shared.isdisjoint(run) for run in found):
            found = [None if model.get_submodule(name).bias is None else ()] * len(found)
        keys[name] = found
    return keys


def _rounds(batches: Iterable[Tensor]) -> Iterator[Tuple[List[int], Optional[Tensor]]]:
    """Join batches (N, C, H, W) to rounds, with the numbers of the images among those of all ranks.

    A rank without images in a round gets None. Smaller images of a round are padded with zeros.
    """
    portions = ((number, batch) for number, batch in numbered(batches))
    waiting = next(portions, None)
    size = 1 if waiting is None else max(1, min(
        ROUND_IMAGES // len(waiting[1]), ROUND_PIXELS // waiting[1][:, 0].numel()))
    size, width = from_first_rank((size, 0 if waiting is None else len(waiting[1])))
    for end in count(size, size):
        if not total_over_ranks(waiting is not None):
            return
        numbers, joined = [], []
        while waiting is not None and waiting[0] < end:
            number, batch = waiting
            numbers += range(number * width, number * width + len(batch))
            joined.append(batch)
            waiting = next(portions, None)
        yield numbers, _join(joined) if joined else None


def _join(batches: Sequence[Tensor]) -> Tensor:
    """Join batches (N, C, H, W), padded at the bottom and right to the largest."""
    height, width = (max(batch.shape[dim] for batch in batches) for dim in (2, 3))
    return torch.cat([F.pad(batch, (0, width - batch.shape[3], 0, height - batch.shape[2]))
                      for batch in batches])

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reconstruction: layers behind what is removed are fitted to what they computed before.

The original and the changed model run side by side on images. In the order of execution each
layer, from the first one on that reads removed channels or is behind a removed block, gets the
weights with which it estimates its original outputs from its new inputs best (asymmetric
reconstruction, `arXiv 1707.06168 <https://arxiv.org/abs/1707.06168>`_): what earlier layers could
not restore, later ones make up for. The offset goes to the running mean of the BatchNorms that
follow, or to the bias.
"""
from dataclasses import dataclass, field
from functools import partial
from typing import Container, Dict, Hashable, Iterable, Iterator, List, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import Call, have_own_norms, recording_calls
from mmgcp.nn.forward import random_image, run_as_tensors, run_on_noise
from mmgcp.nn.hooks import on_inputs
from mmgcp.nn.layers import WEIGHT_TYPES
from mmgcp.nn.sampling import Places
from mmgcp.nn.temporarily import eval_mode
from mmgcp.pruning.surgery import Channels, channels_off, gather_channels, stays_of
from mmgcp.pruning.units import ChannelUnit

from .layer_fits import LayerFit, make_fit
from .rounds import Round, make_rounds

# The samples that the weights before weigh as much as. On a trained YOLOv5-n 300 to 1000 are
# about as good, for 8 images and for 128.
RIDGE = 500.


@dataclass(frozen=True)
class Compensated:
    """What compensation has done: by default, nothing to tell of.

    Attributes:
        incomplete (List[str]): Layers that could not absorb all that removed channels emitted.
        fits (Dict[str, str]): How layers were fitted, in the order of execution.
    """
    incomplete: List[str] = field(default_factory=list)
    fits: Dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def reconstruct(model: nn.Module, units: Sequence[ChannelUnit], removed: Dict[str, Tensor],
                images: Iterable[Tensor], shape: Sequence[int], reference: nn.Module,
                ridge: float = RIDGE) -> Compensated:
    """Fit a model that is about to lose channels, or lacks blocks, to the original, in place.

    Images come in batches (N, C, H, W), which are joined to rounds. In each, a layer is fitted to
    the samples so far before it computes, so that later ones see the inputs that they will have;
    one that runs several times for an image, as in heads that levels share, before each run.
    Memory does not grow with the number of rounds.

    Args:
        model (nn.Module): The model. Its weights are the priors of the fits.
        units (Sequence[ChannelUnit]): Its channel units.
        removed (Dict[str, Tensor]): Channels (K, ) to remove by name of the unit.
        images (Iterable[Tensor]): Of several processes, each has its own.
        shape (Sequence[int]): Shape (C, H, W) of an image that the model runs on.
        reference (nn.Module): The original model, which may have blocks that the model lacks.
        ridge (float): See :class:`LeastSquares`. Defaults to 500.

    Returns:
        Compensated: How layers were fitted; incomplete are those that read removed channels, but
        have neither BatchNorms of their own nor a bias for an offset.

    Raises:
        PruningError: There are no images.
    """
    fits = _Reconstruction(model, reference, gather_channels(units, removed), shape, ridge)
    empty = True
    with eval_mode(model), eval_mode(reference), channels_off(model, units, removed):
        for item in make_rounds(images if fits.keys else ()):
            if item.images is None:  # the structure of the model is all that matters
                item.images = random_image(model, shape)
            fits.round(item)
            empty = False
    if fits.keys and empty:
        raise PruningError('there are no images to calibrate with')
    return fits.done()


class _Reconstruction:
    """A model and its original while layers are fitted."""

    def __init__(self, model: nn.Module, reference: nn.Module, channels: Channels,
                 shape: Sequence[int], ridge: float):
        self.model, self.reference, self.channels, self.ridge = model, reference, channels, ridge
        self.readers = {name for name, side in channels if side == 'in'}
        self.fits: Dict[str, LayerFit] = {}
        # What absorbs the offset of each run of the layers to fit, in the order of execution
        self.keys = _find_absorbers(reference, self.readers, dict(model.named_modules()), shape)

    def done(self) -> Compensated:
        """Return what was done."""
        return Compensated([name for name, keys in self.keys.items()
                            if name in self.readers and None in keys],
                           {name: fit.kind for name, fit in self.fits.items()})

    def round(self, item: Round) -> None:
        """Fit all layers to the images of one more round."""
        images = item.images.to(next(self.model.parameters()))
        notes = {name: partial(self._see_original, item, name) for name in self.keys}
        with recording_calls(self.reference, notes) as calls:
            run_as_tensors(self.reference, images)
        runs = {name: iter(zip(keys, calls[name])) for name, keys in self.keys.items()}
        with on_inputs(self.model, {name: partial(self._see_changed, item, name, found)
                                    for name, found in runs.items()}):
            run_as_tensors(self.model, images)

    def _see_original(self, item: Round, name: str, inputs: Tensor,
                      output: Tensor) -> Tuple[Places, Tensor]:
        """Return samples of a layer to estimate."""
        if name not in self.fits:
            self.fits[name] = self._make_fit(name, inputs, output)
        return self.fits[name].targets(inputs, output, item.choose)

    def _see_changed(self, item: Round, name: str, runs: Iterator[Tuple[Hashable, Call]],
                     inputs: Tensor) -> None:
        """Fit a layer to all samples so far, with those of the run that begins."""
        key, call = next(runs, (None, None))
        if call is None:  # it runs more often than on noise
            return
        if item.numbers:
            self.fits[name].add(inputs, *call.note, key)
        call.note = None  # frees memory
        layer, original = self.fits[name].layer, self.fits[name].original
        offsets = self.fits[name].apply()
        if layer.bias is not None:
            layer.bias.copy_(original.bias + offsets.pop((), 0))
        for norms, offset in offsets.items():
            for norm in norms:
                mean = self.reference.get_submodule(norm).running_mean
                if mean is not None:  # else it subtracts the mean of its inputs
                    self.model.get_submodule(norm).running_mean.copy_(mean - offset)

    def _make_fit(self, name: str, inputs: Tensor, output: Tensor) -> LayerFit:
        layer = self.model.get_submodule(name)
        kept = {side: stays_of(layer, name, side, self.channels).to(layer.weight.device)
                for side in ('in', 'out')}
        return make_fit(layer, self.reference.get_submodule(name), kept, self.ridge, inputs,
                        output)


def _find_absorbers(model: nn.Module, readers: Set[str], present: Container[str],
                    shape: Sequence[int]) -> Dict[str, List[Hashable]]:
    """Find the layers to fit, and what can absorb offsets of their runs.

    These are the layers, among those that the changed model has, that run after a reader, or a
    layer that it lacks, begins. Absorbers are the names of the BatchNorms that follow, if they
    follow nothing else; else () for the bias, or None if there is none.
    """
    order: List[str] = []
    notes = {name: lambda *_, name=name: order.append(name)
             for name, module in model.named_modules() if isinstance(module, WEIGHT_TYPES)}
    with recording_calls(model, notes) as calls:
        run_on_noise(model, shape)
    first = next((number for number, name in enumerate(order)
                  if name in readers or name not in present), len(order))
    norms = {name: [tuple(call.norms) for call in found] for name, found in calls.items()}
    own = have_own_norms(norms, calls.foreign)
    return {name: norms[name] if name in own
            else [None if model.get_submodule(name).bias is None else ()] * len(norms[name])
            for name in dict.fromkeys(order[first:]) if name in present}

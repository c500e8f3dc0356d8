# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Statistics of input channels of layers over any number of images."""
from collections import Counter
from dataclasses import dataclass
from functools import partial, reduce
from typing import Dict, Iterable, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import recording_calls
from mmgcp.nn.forward import ShortRuns
from mmgcp.nn.layers import WEIGHT_TYPES, is_depthwise
from mmgcp.nn.temporarily import eval_mode

Norms = Tuple[_BatchNorm, ...]


@dataclass(frozen=True)
class ChannelStatistics:
    """The smallest, largest and mean values of channels."""
    low: Tensor  # (K, )
    high: Tensor  # (K, )
    total: Tensor  # sums (K, ) in double precision
    count: int  # number of values of each channel

    @classmethod
    def of(cls, values: Tensor, dim: int) -> 'ChannelStatistics':
        """Summarise a tensor with K > 0 channels in a dimension."""
        others = [other for other in range(values.dim()) if other != dim % values.dim()]
        count = values.numel() // values.shape[dim]
        return cls(values.amin(others), values.amax(others),
                   values.mean(others).double() * count, count)

    def __add__(self, other: 'ChannelStatistics') -> 'ChannelStatistics':
        return ChannelStatistics(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high),
            self.total + other.total, self.count + other.count)

    @property
    def mean(self) -> Tensor:
        """Mean values (K, ), without rounding errors if all values are the same."""
        mean = self.total / self.count
        return torch.where(self.low == self.high, self.low.to(mean), mean)

    @property
    def constant(self) -> Tensor:
        """Values (K, ) of constant channels, NaN for other channels."""
        same = self.high - self.low <= 1e-4 * (1 + self.high.abs())
        return ((self.low + self.high).double() / 2).masked_fill(~same, float('nan'))


# Layer -> the BatchNorms that read its output in some of its runs -> its inputs in these runs
InputStatistics = Dict[str, Dict[Norms, ChannelStatistics]]


@torch.no_grad()
def measure_inputs(model: nn.Module, channels: Dict[str, Tensor],
                   images: Iterable[Tensor]) -> InputStatistics:
    """Measure input channels of layers while a model runs on images (N, C, H, W) in eval mode.

    ``channels`` has the indices (K, ) of input channels by name of the layer. Depthwise
    convolutions, which only pass channels on, are left out, and so are layers that do not run.

    Runs that different BatchNorms follow are kept apart, as in heads whose levels share
    convolutions, but not BatchNorms. If not every run of a layer is followed by BatchNorms of
    its own, there is only one entry for all runs, with the key ``()``. No images at all are a
    PruningError.
    """
    def summarise(layer: nn.Module, indices: Tensor, inputs: Tensor, _: Tensor):
        dim = -1 if isinstance(layer, nn.Linear) else -3
        return ChannelStatistics.of(inputs.index_select(dim, indices.to(inputs.device)), dim)

    notes = {name: partial(summarise, module, channels[name])
             for name, module in model.named_modules()
             if name in channels and isinstance(module, WEIGHT_TYPES) and not is_depthwise(module)}
    runs, like, batch = ShortRuns(model), next(model.parameters()), None
    measured: InputStatistics = {}
    with recording_calls(model, notes, runs.seen) as calls, eval_mode(model):
        for batch in images:
            runs(batch.to(like))
            for name, found in calls.items():
                for call in found:
                    entries = measured.setdefault(name, {})
                    norms = tuple(map(model.get_submodule, call.norms))
                    entries[norms] = entries[norms] + call.note if norms in entries else call.note
                found.clear()
    if batch is None:
        raise PruningError('there are no images to calibrate with')
    return _without_shared_norms(measured, map(model.get_submodule, calls.foreign))


def _without_shared_norms(measured: InputStatistics,
                          foreign: Iterable[_BatchNorm]) -> InputStatistics:
    """Join the runs of layers that are not always followed by BatchNorms of their own."""
    uses = Counter(norm for entries in measured.values() for norms in entries for norm in norms)
    shared = {*foreign, *(norm for norm, number in uses.items() if number > 1)}
    return {
        name: entries if all(norms and shared.isdisjoint(norms) for norms in entries)
        else {(): reduce(ChannelStatistics.__add__, entries.values())}
        for name, entries in measured.items()
    }

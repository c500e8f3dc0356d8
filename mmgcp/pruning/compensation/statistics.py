# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Statistics of input channels of layers over any number of images."""
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, Dict, Iterable, Tuple

import torch
import torch.nn as nn
from mmengine.dist import get_world_size
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import have_own_norms, recording_calls
from mmgcp.nn.distributed import gather_over_ranks, sum_by_name, total_over_ranks
from mmgcp.nn.forward import ShortRuns
from mmgcp.nn.layers import WEIGHT_TYPES, is_depthwise
from mmgcp.nn.precision import at_least_single
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
        values = at_least_single(values)
        others = [other for other in range(values.dim()) if other != dim % values.dim()]
        count = values.numel() // values.shape[dim]
        return cls(values.amin(others), values.amax(others),
                   values.mean(others).double() * count, count)

    def __add__(self, other: 'ChannelStatistics') -> 'ChannelStatistics':
        return ChannelStatistics(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high),
            self.total + other.total, self.count + other.count)

    def to(self, device: torch.device) -> 'ChannelStatistics':
        """Move the tensors to a device."""
        return ChannelStatistics(self.low.to(device), self.high.to(device), self.total.to(device),
                                 self.count)

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

    Each rank gives images of its own, and all get the statistics over the images of all.
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
    runs, like, number = ShortRuns(model), next(model.parameters()), 0
    # By name of the layer and names of BatchNorms, which other ranks have as well
    measured: Dict[Tuple[str, Tuple[str, ...]], ChannelStatistics] = {}
    with recording_calls(model, notes, runs.seen) as calls, eval_mode(model):
        for batch in images:
            number += 1
            runs(batch.to(like))
            for name, found in calls.items():
                for call in found:
                    key = name, tuple(call.norms)
                    measured[key] = measured[key] + call.note if key in measured else call.note
                found.clear()
    if not total_over_ranks(number):
        raise PruningError('there are no images to calibrate with')
    foreign = set().union(*gather_over_ranks(calls.foreign))
    joined: InputStatistics = {}
    for (name, norms), item in _sum_over_ranks(measured, like.device).items():
        joined.setdefault(name, {})[tuple(map(model.get_submodule, norms))] = item
    own = have_own_norms(joined, map(model.get_submodule, foreign))
    return {name: entries if name in own
            else {(): reduce(ChannelStatistics.__add__, entries.values())}
            for name, entries in joined.items()}


def _sum_over_ranks(measured: Dict[Any, ChannelStatistics],
                    device: torch.device) -> Dict[Any, ChannelStatistics]:
    """Join the statistics of all ranks, on a device."""
    if get_world_size() == 1:
        return measured
    totals = sum_by_name({key: item.to(torch.device('cpu')) for key, item in measured.items()})
    return {key: item.to(device) for key, item in totals.items()}

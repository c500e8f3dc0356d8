# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What certain input channels of a model's layers carry, over any number of images."""
from collections import Counter
from dataclasses import dataclass
from functools import partial, reduce
from typing import Dict, Iterable, Set, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import Calls, recording_calls
from mmgcp.nn.forward import ShortRuns, eval_mode
from mmgcp.nn.layers import WEIGHT_TYPES, is_depthwise

Norms = Tuple[_BatchNorm, ...]


@dataclass(frozen=True)
class ChannelStatistics:
    """Smallest, largest and mean value of some channels.

    Attributes:
        low (Tensor): Smallest values (K, ).
        high (Tensor): Largest values (K, ).
        total (Tensor): Sums (K, ) in double precision.
        count (int): Number of values of each channel.
    """
    low: Tensor
    high: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, values: Tensor, dim: int) -> 'ChannelStatistics':
        """Make the statistics of a tensor with K > 0 channels in a dimension."""
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
        """Mean values (K, ), without rounding where all values are the same."""
        mean = self.total / self.count
        return torch.where(self.low == self.high, self.low.to(mean), mean)

    @property
    def constant(self) -> Tensor:
        """The values (K, ) of channels that always have the same one, NaN of the others."""
        same = self.high - self.low <= 1e-4 * (1 + self.high.abs())
        return ((self.low + self.high).double() / 2).masked_fill(~same, float('nan'))


# Layer -> the BatchNorms that take what it makes of the inputs -> statistics of the inputs
InputStatistics = Dict[str, Dict[Norms, ChannelStatistics]]


@torch.no_grad()
def measure_inputs(model: nn.Module, channels: Dict[str, Tensor],
                   images: Iterable[Tensor]) -> InputStatistics:
    """Measure input channels of layers while a model runs on images in eval mode.

    The memory that it takes does not depend on the number of batches.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``.
        channels (dict[str, Tensor]): Input channels (K, ) by name of the layer: a
            convolution, transposed convolution or linear layer. Depthwise convolutions
            pass their channels through and are left out.
        images (Iterable[Tensor]): Batches (N, C, H, W).

    Returns:
        dict: Statistics of each layer that ran, apart for the calls that different
        BatchNorms follow, as where the levels of a head share convolutions alone. For a
        layer that is not followed by BatchNorms of its own in each call there is one entry
        for all calls, with ``()`` for the BatchNorms.

    Raises:
        PruningError: There are no images.
    """
    runs = ShortRuns(model)
    like, number = next(model.parameters()), 0
    looks = {name: partial(_input_statistics, module, channels[name])
             for name, module in model.named_modules()
             if name in channels and isinstance(module, WEIGHT_TYPES) and not is_depthwise(module)}
    measured: InputStatistics = {}
    with recording_calls(model, looks, runs.seen) as calls, eval_mode(model):
        for number, batch in enumerate(images, 1):
            runs(batch.to(like))
            _add_calls(model, measured, calls)
    if not number:
        raise PruningError('there are no images to calibrate with')
    return _without_shared_norms(measured, set(map(model.get_submodule, calls.foreign)))


def _input_statistics(layer: nn.Module, channels: Tensor, inputs: Tensor,
                      output: Tensor) -> ChannelStatistics:
    dim = -1 if isinstance(layer, nn.Linear) else -3
    return ChannelStatistics.of(inputs.index_select(dim, channels.to(inputs.device)), dim)


def _add_calls(model: nn.Module, measured: InputStatistics, calls: Calls) -> None:
    """Add the calls of one run to what was measured before, and forget them."""
    for name, found in calls.items():
        for call in found:
            entries = measured.setdefault(name, {})
            norms = tuple(map(model.get_submodule, call.norms))
            entries[norms] = entries[norms] + call.note if norms in entries else call.note
        found.clear()


def _without_shared_norms(measured: InputStatistics, foreign: Set[_BatchNorm]) -> InputStatistics:
    uses = Counter(norm for entries in measured.values() for norms in entries for norm in norms)
    shared = foreign | {norm for norm, number in uses.items() if number > 1}
    return {
        name: entries if all(norms and shared.isdisjoint(norms) for norms in entries)
        else {(): reduce(ChannelStatistics.__add__, entries.values())}
        for name, entries in measured.items()
    }

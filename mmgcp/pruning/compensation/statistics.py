# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What certain input channels of a model's layers carry, over any number of images."""
from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from typing import Dict, Iterable, List, Set, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import ShortRuns, eval_mode
from mmgcp.nn.hooks import hooked, maker_of, set_maker
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


@dataclass
class _Call:
    """One call of a layer.

    Attributes:
        name (str): Name of the layer.
        inputs (ChannelStatistics): Of the input channels.
        norms (List): The BatchNorms that read the output.
    """
    name: str
    inputs: ChannelStatistics
    norms: List[_BatchNorm] = field(default_factory=list)


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
    calls: List[_Call] = []
    foreign: Set[_BatchNorm] = set()  # that also normalise something else

    def look(name):
        def hook(layer, args, output):
            calls.append(_Call(name, _input_statistics(layer, args[0], channels[name])))
            set_maker(output, calls[-1])
            runs.seen()
        return hook

    def find_call(norm, args):
        call = maker_of(args[0])
        if call is None:
            foreign.add(norm)
        else:
            call.norms.append(norm)
            runs.seen()

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(find_call))
        elif name in channels and isinstance(module, WEIGHT_TYPES) and not is_depthwise(module):
            handles.append(module.register_forward_hook(look(name)))
    measured: InputStatistics = {}
    like, number = next(model.parameters()), 0
    with hooked(handles), eval_mode(model):
        for number, batch in enumerate(images, 1):
            runs(batch.to(like))
            _add_calls(measured, calls)
    if not number:
        raise PruningError('there are no images to calibrate with')
    return _without_shared_norms(measured, foreign)


def _input_statistics(layer: nn.Module, inputs: Tensor, channels: Tensor) -> ChannelStatistics:
    dim = -1 if isinstance(layer, nn.Linear) else -3
    return ChannelStatistics.of(inputs.index_select(dim, channels.to(inputs.device)), dim)


def _add_calls(measured: InputStatistics, calls: List[_Call]) -> None:
    """Add the calls of one run to what was measured before, and forget them."""
    for call in calls:
        entries, norms = measured.setdefault(call.name, {}), tuple(call.norms)
        entries[norms] = entries[norms] + call.inputs if norms in entries else call.inputs
    calls.clear()


def _without_shared_norms(measured: InputStatistics, foreign: Set[_BatchNorm]) -> InputStatistics:
    uses = Counter(norm for entries in measured.values() for norms in entries for norm in norms)
    shared = foreign | {norm for norm, number in uses.items() if number > 1}
    return {
        name: entries if all(norms and shared.isdisjoint(norms) for norms in entries)
        else {(): reduce(ChannelStatistics.__add__, entries.values())}
        for name, entries in measured.items()
    }

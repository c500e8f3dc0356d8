# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The channels of several BatchNorm layers as one vector."""
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

OTHER = 'other'


@dataclass(frozen=True)
class LayerScales:
    """The scale factors of one BatchNorm layer.

    Attributes:
        name (str): Name of the layer.
        gamma (nn.Parameter): Its weight (C, ).
        chosen (Tensor, optional): Mask (C, ) of the channels that are penalised; None: all.
        segments (Tensor, optional): Index (C, ) of the coupled channel that each channel
            belongs to, negative for those that belong to none; None: all belong to none.
        group (str): Name of its layer group.
        rate_factor (float): Factor on the sparsity rate.
    """
    name: str
    gamma: nn.Parameter
    chosen: Optional[Tensor] = None
    segments: Optional[Tensor] = None
    group: str = OTHER
    rate_factor: float = 1.


class ScaleFactors:
    """The scale factors that are penalised.

    Args:
        layers (Sequence[LayerScales]): Their layers, at least one.
    """

    def __init__(self, layers: Sequence[LayerScales]) -> None:
        self.layers = list(layers)
        self._trained: Tuple[Optional[List[bool]], Optional[Channels]] = (None, None)

    @property
    def gammas(self) -> List[nn.Parameter]:
        """The weights of all layers."""
        return [layer.gamma for layer in self.layers]

    def trained(self) -> Optional['Channels']:
        """The channels of the layers that are not frozen, or None if all are frozen."""
        # Checked at each call, because detectors freeze stages when they enter train mode.
        flags = [layer.gamma.requires_grad for layer in self.layers]
        if flags != self._trained[0]:
            layers = [layer for layer, flag in zip(self.layers, flags) if flag]
            self._trained = flags, Channels(layers) if layers else None
        return self._trained[1]


class Channels:
    """The chosen channels of some layers.

    Args:
        layers (Sequence[LayerScales]): The layers, at least one, each with a chosen channel.

    Attributes:
        gammas (List[nn.Parameter]): The scale factors of each layer.
        groups (Dict[str, Tensor]): Mask (n, ) of the channels of each layer group.
        rate_factors (Tensor, optional): Factor (n, ) on the rate of each channel; None: all 1.
    """

    def __init__(self, layers: Sequence[LayerScales]) -> None:
        self.gammas = [layer.gamma for layer in layers]
        self.sizes = [gamma.numel() for gamma in self.gammas]
        masks = [torch.ones(size, dtype=torch.bool) if layer.chosen is None else layer.chosen
                 for layer, size in zip(layers, self.sizes)]
        device = self.gammas[0].device
        chosen = torch.cat(masks)
        self._index = None if bool(chosen.all()) else torch.nonzero(chosen).flatten().to(device)
        names = list(dict.fromkeys(layer.group for layer in layers))
        owners = self._per_channel([names.index(layer.group) for layer in layers])[chosen]
        self.groups: Dict[str, Tensor] = {
            name: owners == number for number, name in enumerate(names)
        }
        self._coupling: Optional[Coupling] = None
        factors = self._per_channel([layer.rate_factor for layer in layers])[chosen]
        if any(layer.segments is not None for layer in layers):
            segments = self._segments(layers)[chosen]
            factors = _segment_means(factors, segments)
            self._coupling = Coupling(segments).to(device)
        self.rate_factors = None if bool((factors == 1).all()) else factors.to(self.gammas[0])

    def values(self) -> Tensor:
        """The scale factors (n, ) of the chosen channels."""
        values = self._all_values()
        return values if self._index is None else values[self._index]

    def magnitudes(self, values: Tensor) -> Tensor:
        """What the penalty shrinks: \\|gamma\\|, or its root mean square over coupled layers."""
        return values.abs() if self._coupling is None else self._coupling.root_mean_square(values)

    def directions(self, values: Tensor, magnitudes: Tensor) -> Tensor:
        """The derivative of the sum of the magnitudes; 0 where there is none."""
        if self._coupling is None:
            return values.sign()
        return torch.where(magnitudes > 0, values / magnitudes, torch.zeros_like(values))

    def split(self, values: Tensor) -> List[Tensor]:
        """Split values (n, ) by layer, with 0 for the channels that were not chosen."""
        if self._index is not None:
            values = values.new_zeros(sum(self.sizes)).index_copy(0, self._index, values)
        return list(values.split(self.sizes))

    def split_with_others(self, values: Tensor) -> List[Tensor]:
        """Split values (n, ) by layer; channels that were not chosen keep their scale factor."""
        if self._index is not None:
            values = self._all_values().index_copy(0, self._index, values)
        return list(values.split(self.sizes))

    def spread(self, values: Sequence[float]) -> Tensor:
        """Repeat one value per layer for each of the layer's chosen channels."""
        spread = self._per_channel(values).to(self.gammas[0])
        return spread if self._index is None else spread[self._index]

    def _all_values(self) -> Tensor:
        return torch.cat([gamma.detach() for gamma in self.gammas])

    def _per_channel(self, values: Sequence[float]) -> Tensor:
        return torch.repeat_interleave(torch.tensor(values), torch.tensor(self.sizes))

    def _segments(self, layers: Sequence[LayerScales]) -> Tensor:
        """The segments of all channels; those that are not coupled get one of their own."""
        free = 1 + max(int(layer.segments.max()) for layer in layers
                       if layer.segments is not None)
        segments = free + torch.arange(sum(self.sizes))
        for part, layer in zip(segments.split(self.sizes), layers):
            if layer.segments is not None:
                part.copy_(torch.where(layer.segments < 0, part, layer.segments))
        return segments


class Coupling:
    """Which channels of a vector are coupled, that is can only be removed together.

    Args:
        segments (Tensor): Index (n, ) of the coupled channel that each channel belongs to.
    """

    def __init__(self, segments: Tensor) -> None:
        rows, counts = segments.unique(return_inverse=True, return_counts=True)[1:]
        self.counts = counts[counts > 1].to(torch.float32)
        self.positions = torch.nonzero(counts[rows] > 1).flatten()
        # Index of each coupled channel among those that have several members
        self.rows = ((counts > 1).cumsum(0) - 1)[rows[self.positions]]
        # A table of the members' positions instead of index_add: on CUDA, the order in which
        # index_add sums is random, and the ranks would drift apart. Rows are filled up with
        # the position len(segments), which stands for a zero.
        self.members = segments.new_full(
            (len(self.counts), int(counts.max())), len(segments))
        order = self.rows.argsort(stable=True)
        sorted_rows = self.rows[order]
        first = torch.searchsorted(sorted_rows, torch.arange(len(self.counts)))
        columns = torch.arange(len(order)) - first[sorted_rows]
        self.members[sorted_rows, columns] = self.positions[order]

    def to(self, device: torch.device) -> 'Coupling':
        """Move the indices to a device."""
        for name, tensor in vars(self).items():
            setattr(self, name, tensor.to(device))
        return self

    def root_mean_square(self, values: Tensor) -> Tensor:
        """Root mean square (n, ) over the channels that each channel is coupled with.

        For a channel that is coupled with nothing it is exactly the absolute value.
        """
        magnitudes = values.abs()
        if not len(self.counts):
            return magnitudes
        squares = torch.cat([values.square(), values.new_zeros(1)])
        means = squares[self.members].sum(1) / self.counts
        return magnitudes.index_copy(0, self.positions, means.sqrt().to(magnitudes)[self.rows])


def _segment_means(values: Tensor, segments: Tensor) -> Tensor:
    """Replace each value by the mean of its segment."""
    rows, counts = segments.unique(return_inverse=True, return_counts=True)[1:]
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, rows, values.double())
    return (sums / counts)[rows].to(values.dtype)

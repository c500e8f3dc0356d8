# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What pruning led to."""
from dataclasses import dataclass
from typing import Dict, List, NamedTuple

import torch.nn as nn
from torch import Tensor

from .detector import ChannelTable
from .plan import PruningPlan


class LayerRow(NamedTuple):
    """Output channels of a layer before and after pruning."""
    layer: str
    group: str
    before: int
    after: int


@dataclass
class PruningResult:
    """What pruning led to.

    Attributes:
        model (nn.Module): The pruned model; after a dry run the model as it was.
        plan (PruningPlan): What was removed.
        channels_before (ChannelTable): Channels of all layers before.
        channels_after (ChannelTable): Channels of all layers after.
        params (List[int]): Parameters before and after.
        macs (List[int]): MACs for one image before and after.
        scores (Dict[str, Tensor]): All scores (K, ) by layer group; empty where they did not
            decide.
        uncompensated (List[str]): Layers that could not absorb what removed channels emitted.
    """
    model: nn.Module
    plan: PruningPlan
    channels_before: ChannelTable
    channels_after: ChannelTable
    params: List[int]
    macs: List[int]
    scores: Dict[str, Tensor]
    uncompensated: List[str]

    @property
    def changed_channels(self) -> ChannelTable:
        """The channels after of the layers that were pruned."""
        return {name: counts for name, counts in self.channels_after.items()
                if counts != self.channels_before[name]}

    @property
    def layers(self) -> List[LayerRow]:
        """The convolutions and linear layers in the order of the model."""
        groups = {layer: group for item in self.plan.units for layer, group in item.layers.items()}
        return [
            LayerRow(name, groups.get(name, ''), counts[-1], self.channels_after[name][-1])
            for name, counts in self.channels_before.items() if len(counts) == 2
        ]

    @property
    def report(self) -> dict:
        """All figures, as written to ``report.json``."""
        return dict(
            params=dict(before=self.params[0], after=self.params[1]),
            macs=dict(before=self.macs[0], after=self.macs[1]),
            thresholds=self.plan.thresholds,
            options=self.plan.options,
            layers=[row._asdict() for row in self.layers],
            skipped=self.plan.skipped,
            uncompensated=self.uncompensated)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What pruning led to."""
from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, NamedTuple

import torch.nn as nn
from torch import Tensor

from .blocks.removal import AbsentBlocks
from .channel_table import ChannelTable, changed_sides
from .plan import PruningPlan


class LayerRow(NamedTuple):
    """Output channels of a layer before and after pruning; none are left of a removed block."""
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
        fits (Dict[str, str]): How layers were fitted to their original outputs, if they were.
        compensation (str): How layers that stay made up for others; '' if they did not.
        recovery (Dict[str, Any]): What the option ``recover`` returned, if there was one.
        accuracy (Dict[str, Any]): What was measured before and after, if anything was; see
            :class:`mmgcp.pipeline.accuracy.AccuracyRecord`.
        latency (Dict[str, Any]): The milliseconds ``before`` and ``after`` (None if that has not
            been measured, as on another machine, whose ``before`` is without removed blocks), the
            ``target``, and whether it was ``met``, if there was one.
        absent_blocks (AbsentBlocks): The blocks that have been removed, each with the name of the
            parameter that scales its shortcut.
        depths (List[dict]): If their number was searched for, the numbers of ``blocks`` that were
            tried, each with the ``loss`` it led to.
    """
    model: nn.Module
    plan: PruningPlan
    channels_before: ChannelTable
    channels_after: ChannelTable
    params: List[int]
    macs: List[int]
    scores: Dict[str, Tensor]
    uncompensated: List[str] = field(default_factory=list)
    fits: Dict[str, str] = field(default_factory=dict)
    compensation: str = ''
    recovery: Dict[str, Any] = field(default_factory=dict)
    accuracy: Dict[str, Any] = field(default_factory=dict)
    latency: Dict[str, Any] = field(default_factory=dict)
    absent_blocks: AbsentBlocks = field(default_factory=dict)
    depths: List[Dict[str, Any]] = field(default_factory=list)

    @property
    def changed_channels(self) -> ChannelTable:
        """The channels after of the layers that were pruned, None on a side that was not."""
        return changed_sides(self.channels_before, self.channels_after)

    @property
    def layers(self) -> List[LayerRow]:
        """The convolutions and linear layers in the order of the model."""
        groups = {layer: group for item in self.plan.units for layer, group in item.layers.items()}
        return [
            LayerRow(name, groups.get(name, ''), counts[-1],
                     self.channels_after.get(name, [0])[-1])
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
            blocks=[asdict(block) for block in self.plan.blocks],
            skipped_blocks=self.plan.skipped_blocks,
            skipped=self.plan.skipped,
            uncompensated=self.uncompensated,
            fits=self.fits,
            compensation=self.compensation,
            recovery=self.recovery,
            accuracy=self.accuracy,
            latency=self.latency)

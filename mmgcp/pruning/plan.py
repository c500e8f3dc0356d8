# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The pruning plan, made from scores and perhaps edited by people, and what it led to."""
import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Sequence, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.utils.json_files import parse_json, read_text, shorten

from .detector import ChannelTable, changed_sides
from .scored import ScoredUnit
from .units import ChannelUnit

FORMAT = 'mmgcp.pruning_plan'


@dataclass
class UnitPlan:
    """What happens to one channel unit.

    Attributes:
        name (str): Name of the unit.
        layers (Dict[str, str]): Layers whose output channels it couples, with the layer
            group of each, empty for none.
        size (int): Number of channels before.
        removed (List[int]): Channels to remove, ascending.
    """
    name: str
    layers: Dict[str, str]
    size: int
    removed: List[int]


@dataclass
class PruningPlan:
    """Which channels are removed, and why.

    Attributes:
        units (List[UnitPlan]): One for each prunable channel unit.
        thresholds (Dict[str, float]): Threshold of each layer group.
        skipped (Dict[str, str]): Layers that are left alone, with the reason.
        options (dict): The options that led to the plan.
    """
    units: List[UnitPlan]
    thresholds: Dict[str, float] = field(default_factory=dict)
    skipped: Dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def removed(self) -> Dict[str, Tensor]:
        """Return the removed channels of each unit as an index tensor."""
        return {
            item.name: torch.tensor(item.removed, dtype=torch.long)
            for item in self.units if item.removed
        }

    def save(self, path: Union[str, Path]) -> None:
        """Write the plan as JSON, one line a unit."""
        data = asdict(self)
        units = ',\n    '.join(json.dumps(item) for item in data.pop('units'))
        head = json.dumps(dict(format=FORMAT, version=2, **data), indent=2)
        Path(path).write_text(f'{head[:-2]},\n  "units": [\n    {units}\n  ]\n}}\n')

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'PruningPlan':
        """Read a plan, which has yet to be compared with a model: see :func:`validate_plan`.

        Raises:
            PruningError: There is no such file, or it is no plan.
        """
        data = parse_json(read_text(path, 'the plan', PruningError), f'the plan {path}',
                          PruningError)
        if not isinstance(data, dict) or data.get('format') != FORMAT:
            raise PruningError(f'{path} is not a pruning plan')
        if data.get('version') != 2:
            raise PruningError(f'the plan {path} is of version {shorten(data.get("version"))}; '
                               'this mmgcp reads version 2')
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        units = known.get('units')
        if not isinstance(units, list) or not units:
            raise PruningError(f'the plan {path} has no units')
        known['units'] = [_read_unit(number, item) for number, item in enumerate(units)]
        for name, kind, test in _CONTENTS:
            content = known.get(name, {})
            if not isinstance(content, dict) or not all(map(test, content.values())):
                raise PruningError(f'{name} of the plan {path} must be {kind}, but is '
                                   f'{shorten(content)}')
        return cls(**known)


def _is_threshold(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)
                             and not math.isnan(value))


# What parts of a plan file have to contain besides the units
_CONTENTS = (
    ('thresholds', 'numbers by layer group', _is_threshold),
    ('skipped', 'texts by layer', lambda value: isinstance(value, str)),
    ('options', 'values by option', lambda value: True),
)


def make_plan(units: Sequence[ChannelUnit], removed: Dict[str, Tensor],
              scored: Iterable[ScoredUnit] = ()) -> PruningPlan:
    """Make the plan for all units of a model that removes channels (K, ), ascending, of some.

    Those that have been scored know the layer groups.
    """
    groups = {item.unit.name: item.groups for item in scored}
    plans = []
    for unit in units:
        known = groups.get(unit.name, {})
        layers = {item.module: known[item.module].name if item.module in known else ''
                  for item in unit.side('out')}
        gone = removed[unit.name].tolist() if unit.name in removed else []
        plans.append(UnitPlan(unit.name, layers, unit.size, gone))
    return PruningPlan(plans)


def validate_plan(plan: PruningPlan, units: Iterable[ChannelUnit]) -> None:
    """Check that a plan fits a model.

    Args:
        plan (PruningPlan): The plan, perhaps edited by hand.
        units (Iterable[ChannelUnit]): The channel units of the model.

    Raises:
        PruningError: It does not; says what is wrong with which unit.
    """
    units = {unit.name: unit for unit in units}
    names = [item.name for item in plan.units]
    for item in plan.units:
        if item.name not in units:
            close = difflib.get_close_matches(item.name[:200], units, n=1)
            hint = f'; the closest is {close[0]!r}' if close else ''
            raise PruningError(f'the plan names the unit {shorten(item.name)}, which the model '
                               f'does not have{hint}: is it the architecture that the plan was '
                               'made for?')
        if names.count(item.name) > 1:
            raise PruningError(f'the plan names the unit {item.name!r} twice')
        _validate_unit(item, units[item.name])
    missing = [name for name in units if name not in names]
    if missing:
        raise PruningError(f'the plan lacks {len(missing)} of the units of the model, such as '
                           f'{missing[0]!r}: is it the architecture that the plan was made for?')


def _read_unit(number: int, data) -> UnitPlan:
    expected = {item.name for item in fields(UnitPlan)}
    if (not isinstance(data, dict) or set(data) != expected or not isinstance(data['name'], str)
            or not isinstance(data['layers'], dict)
            or not all(isinstance(group, str) for group in data['layers'].values())):
        raise PruningError(f'unit {number} of the plan must have {sorted(expected)}, layers with '
                           'the group of each')
    if type(data['size']) is not int:
        raise PruningError(f'"size" of the unit {shorten(data["name"])} must be a whole number, '
                           f'but is {shorten(data["size"])}')
    indices = data['removed']
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise PruningError(f'"removed" of the unit {shorten(data["name"])} must be a list of '
                           'integers')
    return UnitPlan(**dict(data, removed=sorted(indices)))


def _validate_unit(item: UnitPlan, unit: ChannelUnit) -> None:
    where = f'the plan for the unit {item.name!r}'
    if item.size != unit.size:
        raise PruningError(f'{where} is for {item.size} channels, but the model has '
                           f'{unit.size}: is it the architecture that the plan was made for?')
    layers = {piece.module for piece in unit.side('out')}
    if set(item.layers) != layers:
        name = sorted(layers.symmetric_difference(item.layers))[0]
        raise PruningError(f'{where} disagrees with the model about the layers that are coupled: '
                           f'{shorten(name)} is {"not " if name in layers else ""}in the plan')
    if len(set(item.removed)) != len(item.removed):
        raise PruningError(f'{where} removes a channel twice')
    wrong = [index for index in item.removed if not 0 <= index < item.size]
    if wrong:
        raise PruningError(f'{where} removes channel {wrong[0]}, but they are 0 to '
                           f'{item.size - 1}')
    gone = unit.mask(torch.tensor(item.removed, dtype=torch.long))
    for piece in unit.slices:
        if bool(gone[piece.unit_index].all()):
            raise PruningError(f'{where} removes all of its channels that {piece.module} has; one '
                               'has to stay')
    _validate_constraints(where, unit, gone)


def _validate_constraints(where: str, unit: ChannelUnit, gone: Tensor) -> None:
    if unit.norm_groups is not None:
        torn = set(unit.norm_groups[gone].tolist()) & set(unit.norm_groups[~gone].tolist())
        if torn:
            together = (unit.norm_groups == min(torn)).nonzero().flatten().tolist()
            raise PruningError(f'{where} removes only some of the channels {together}, which a '
                               'GroupNorm normalises together')
    if unit.conv_groups is not None:
        counts = unit.conv_groups[gone & (unit.conv_groups >= 0)].bincount(
            minlength=int(unit.conv_groups.max()) + 1)
        if bool((counts != counts[0]).any()):
            raise PruningError(f'{where} removes {counts.tolist()} channels of the groups of a '
                               'convolution; they have to be equally many')
        if int(counts[0]) == int((unit.conv_groups == 0).sum()):
            raise PruningError(f'{where} removes all channels of the groups of a convolution')


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
        fits (Dict[str, str]): How layers were fitted to their original outputs, if they were.
        compensation (str): How layers that stay made up for others; '' if they did not.
        recovery (Dict[str, Any]): What the option ``recover`` returned, if there was one.
        accuracy (Dict[str, Any]): What was measured before and after, if anything was; see
            :class:`mmgcp.pipeline.accuracy.AccuracyRecord`.
        latency (Dict[str, Any]): The milliseconds ``before`` and ``after`` (None if that has not
            been measured), the ``target``, and whether it was ``met``, if there was one.
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

    @property
    def changed_channels(self) -> ChannelTable:
        """The channels after of the layers that were pruned, None on a side that was not."""
        return changed_sides(self.channels_before, self.channels_after)

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
            uncompensated=self.uncompensated,
            fits=self.fits,
            compensation=self.compensation,
            recovery=self.recovery,
            accuracy=self.accuracy,
            latency=self.latency)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The pruning plan, made from scores and perhaps edited by people."""
import difflib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Union

import torch
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.utils.json_files import parse_json, read_text, shorten

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
class BlockPlan:
    """What happens to a block that can be removed as a whole.

    Attributes:
        name (str): Name of its module.
        kind (str): 'residual' or 'plain'; see :mod:`mmgcp.pruning.blocks`.
        removed (bool): Whether it is removed.
        score (float, optional): Its score when it was chosen; None if it was not scored.
    """
    name: str
    kind: str
    removed: bool
    score: Optional[float] = None


@dataclass
class PruningPlan:
    """Which blocks and which channels are removed, and why.

    Attributes:
        units (List[UnitPlan]): One for each prunable channel unit of what the blocks leave.
        thresholds (Dict[str, float]): Threshold of each layer group.
        skipped (Dict[str, str]): Layers that are left alone, with the reason.
        options (dict): The options that led to the plan.
        blocks (List[BlockPlan]): The blocks that can be removed.
        skipped_blocks (Dict[str, str]): What looks like them, but cannot, with the reason.
    """
    units: List[UnitPlan]
    thresholds: Dict[str, float] = field(default_factory=dict)
    skipped: Dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    blocks: List[BlockPlan] = field(default_factory=list)
    skipped_blocks: Dict[str, str] = field(default_factory=dict)

    @property
    def removed_blocks(self) -> List[str]:
        """The names of the blocks that are removed."""
        return [block.name for block in self.blocks if block.removed]

    def removed(self) -> Dict[str, Tensor]:
        """Return the removed channels of each unit as an index tensor."""
        return {
            item.name: torch.tensor(item.removed, dtype=torch.long)
            for item in self.units if item.removed
        }

    def save(self, path: Union[str, Path]) -> None:
        """Write the plan as JSON, one line a block and a unit."""
        data = asdict(self)
        rows = {name: [json.dumps(item) for item in data.pop(name)] for name in ('blocks', 'units')}
        text = json.dumps(dict(format=FORMAT, version=2, **data), indent=2)[:-2]
        for name, lines in rows.items():
            lines = ',\n    '.join(lines)
            text += f',\n  "{name}": [\n    {lines}\n  ]' if lines else f',\n  "{name}": []'
        Path(path).write_text(f'{text}\n}}\n')

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
        blocks = known.get('blocks', [])
        if not isinstance(blocks, list):
            raise PruningError(f'blocks of the plan {path} must be a list, but is '
                               f'{shorten(blocks)}')
        known['blocks'] = [_read_block(number, item) for number, item in enumerate(blocks)]
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
    ('skipped_blocks', 'texts by block', lambda value: isinstance(value, str)),
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


def _read_block(number: int, data) -> BlockPlan:
    expected = {item.name for item in fields(BlockPlan)}
    if (not isinstance(data, dict) or set(data) != expected
            or not all(isinstance(data[key], str) for key in ('name', 'kind'))
            or type(data['removed']) is not bool or not _is_threshold(data['score'])):
        raise PruningError(f'block {number} of the plan must have {sorted(expected)}, where '
                           'removed is true or false')
    return BlockPlan(**data)


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

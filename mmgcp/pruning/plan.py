# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The pruning plan: made by the planner, read and edited by people, applied by surgery."""
import difflib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Union

import torch
from torch import Tensor

from .structures import CoupledChannels, PruningError

FORMAT = 'mmgcp.pruning_plan'


@dataclass
class SetPlan:
    """What happens to one coupled set.

    Attributes:
        name (str): Name of the set.
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
        sets (List[SetPlan]): One for each prunable coupled set.
        thresholds (Dict[str, float]): Threshold of each layer group.
        skipped (Dict[str, str]): Layers that are left alone, with the reason.
        options (dict): The options that led to the plan.
    """
    sets: List[SetPlan]
    thresholds: Dict[str, float] = field(default_factory=dict)
    skipped: Dict[str, str] = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def removed(self) -> Dict[str, Tensor]:
        """Return the removed channels of each set as an index tensor."""
        return {
            item.name: torch.tensor(item.removed, dtype=torch.long)
            for item in self.sets if item.removed
        }

    def save(self, path: Union[str, Path]) -> None:
        """Write the plan as JSON, one line a set."""
        data = asdict(self)
        sets = ',\n    '.join(json.dumps(item) for item in data.pop('sets'))
        head = json.dumps(dict(format=FORMAT, version=1, **data), indent=2)
        Path(path).write_text(f'{head[:-2]},\n  "sets": [\n    {sets}\n  ]\n}}\n')

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'PruningPlan':
        """Read a plan.

        Args:
            path (str | Path): The file.

        Returns:
            PruningPlan: The plan, which has yet to be compared with a model: see
            :func:`validate_plan`.

        Raises:
            PruningError: There is no such file, or it is no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise PruningError(f'the plan {path} cannot be read: {error.strerror}') from None
        except ValueError as error:
            raise PruningError(f'the plan {path} is not JSON: {error}') from None
        if not isinstance(data, dict) or data.get('format') != FORMAT:
            raise PruningError(f'{path} is not a pruning plan')
        if data.get('version') != 1:
            raise PruningError(f'the plan {path} is of version {data.get("version")}; this mmgcp '
                               'reads version 1')
        known = {item.name: data[item.name] for item in fields(cls) if item.name in data}
        sets = known.get('sets')
        if not isinstance(sets, list) or not sets:
            raise PruningError(f'the plan {path} has no sets')
        known['sets'] = [_read_set(number, item) for number, item in enumerate(sets)]
        return cls(**known)


def complete_plan(plan: PruningPlan, coupled_sets: Sequence[CoupledChannels],
                  removed: Optional[Dict[str, Tensor]] = None) -> PruningPlan:
    """Return a plan that names all sets, those without scores included.

    Args:
        plan (PruningPlan): The plan.
        coupled_sets (Sequence[CoupledChannels]): All sets.
        removed (dict[str, Tensor], optional): Removed channels, by name of the set. Defaults
            to those of the plan.

    Returns:
        PruningPlan: The plan.
    """
    known = {item.name: item for item in plan.sets}
    removed = plan.removed() if removed is None else removed
    sets = []
    for coupled in coupled_sets:
        item = known.get(coupled.name) or SetPlan(
            coupled.name, {piece.module: '' for piece in coupled.side('out')}, coupled.size, [])
        channels = removed.get(coupled.name)
        sets.append(replace(item, removed=[] if channels is None else channels.tolist()))
    return replace(plan, sets=sets)


def validate_plan(plan: PruningPlan, coupled_sets: Iterable[CoupledChannels]) -> None:
    """Check that a plan fits a model.

    Args:
        plan (PruningPlan): The plan, perhaps edited by hand.
        coupled_sets (Iterable[CoupledChannels]): The coupled sets of the model.

    Raises:
        PruningError: It does not; says what is wrong with which set.
    """
    sets = {coupled.name: coupled for coupled in coupled_sets}
    names = [item.name for item in plan.sets]
    for item in plan.sets:
        if item.name not in sets:
            close = difflib.get_close_matches(item.name, sets, n=1)
            hint = f'; the closest is {close[0]!r}' if close else ''
            raise PruningError(f'the plan names the set {item.name!r}, which the model does not '
                               f'have{hint}: is it the architecture that the plan was made for?')
        if names.count(item.name) > 1:
            raise PruningError(f'the plan names the set {item.name!r} twice')
        _validate_set(item, sets[item.name])
    missing = [name for name in sets if name not in names]
    if missing:
        raise PruningError(f'the plan lacks {len(missing)} of the sets of the model, such as '
                           f'{missing[0]!r}: is it the architecture that the plan was made for?')


def _read_set(number: int, data) -> SetPlan:
    expected = {item.name for item in fields(SetPlan)}
    if (not isinstance(data, dict) or set(data) != expected or not isinstance(data['name'], str)
            or not isinstance(data['layers'], dict)):
        raise PruningError(f'set {number} of the plan must have {sorted(expected)}, layers with '
                           'the group of each')
    indices = data['removed']
    if not isinstance(indices, list) or not all(type(index) is int for index in indices):
        raise PruningError(f'"removed" of the set {data["name"]!r} must be a list of integers')
    return SetPlan(**dict(data, removed=sorted(indices)))


def _validate_set(item: SetPlan, coupled: CoupledChannels) -> None:
    where = f'the plan for the set {item.name!r}'
    if item.size != coupled.size:
        raise PruningError(f'{where} is for {item.size} channels, but the model has '
                           f'{coupled.size}: is it the architecture that the plan was made for?')
    layers = {piece.module for piece in coupled.side('out')}
    if set(item.layers) != layers:
        name = sorted(layers.symmetric_difference(item.layers))[0]
        raise PruningError(f'{where} disagrees with the model about the layers that are coupled: '
                           f'{name!r} is {"not " if name in layers else ""}in the plan')
    if len(set(item.removed)) != len(item.removed):
        raise PruningError(f'{where} removes a channel twice')
    wrong = [index for index in item.removed if not 0 <= index < item.size]
    if wrong:
        raise PruningError(f'{where} removes channel {wrong[0]}, but they are 0 to '
                           f'{item.size - 1}')
    if len(item.removed) == item.size:
        raise PruningError(f'{where} removes all of its channels; one has to stay')
    gone = coupled.mask(torch.tensor(item.removed, dtype=torch.long))
    for piece in coupled.slices:
        if bool(gone[piece.roots].all()):
            raise PruningError(f'{where} removes all of its channels that {piece.module} has; one '
                               'has to stay')
    _validate_constraints(where, coupled, gone)


def _validate_constraints(where: str, coupled: CoupledChannels, gone: Tensor) -> None:
    if coupled.units is not None:
        torn = set(coupled.units[gone].tolist()) & set(coupled.units[~gone].tolist())
        if torn:
            together = (coupled.units == min(torn)).nonzero().flatten().tolist()
            raise PruningError(f'{where} removes only some of the channels {together}, which a '
                               'GroupNorm normalises together')
    if coupled.blocks is not None:
        counts = coupled.blocks[gone & (coupled.blocks >= 0)].bincount(
            minlength=int(coupled.blocks.max()) + 1)
        if bool((counts != counts[0]).any()):
            raise PruningError(f'{where} removes {counts.tolist()} channels of the groups of a '
                               'convolution; they have to be equally many')
        if int(counts[0]) == int((coupled.blocks == 0).sum()):
            raise PruningError(f'{where} removes all channels of the groups of a convolution')

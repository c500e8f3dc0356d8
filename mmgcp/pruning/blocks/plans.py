# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Blocks in plans, which people may edit: other blocks go or stay, and units follow."""
from typing import Dict, List, Sequence

from mmgcp.errors import PruningError
from mmgcp.pruning.plan import BlockPlan, PruningPlan, UnitPlan
from mmgcp.pruning.units import ChannelUnit
from mmgcp.utils.json_files import shorten

from .finding import Blocks

SHOWN = 12  # names in an error


def check_names(names: Sequence[str], blocks: Blocks) -> None:
    """Raise a PruningError that lists the candidates unless all are names of blocks, named once."""
    found = [block.name for block in blocks.found]
    for name in names:
        if name in blocks.skipped:
            raise PruningError(f'the block {name!r} cannot be removed: {blocks.skipped[name]}')
        if name not in found:
            raise PruningError(f'the detector has no block {shorten(name)} that can be removed: '
                               f'{list_of_names(found)}')
        if list(names).count(name) > 1:
            raise PruningError(f'the block {name!r} is to be removed twice')


def list_of_names(names: Sequence[str]) -> str:
    """End an error with the names of the blocks that there are."""
    if not names:
        return 'there are none'
    more = f' and {len(names) - SHOWN} more (a plan lists them all)' if len(names) > SHOWN else ''
    return f'there are {", ".join(names[:SHOWN])}{more}'


def plan_blocks(blocks: Blocks, scores: Dict[str, float],
                removed: Sequence[str]) -> List[BlockPlan]:
    """List all blocks of a detector for a plan that removes some of them."""
    return [BlockPlan(block.name, block.kind, block.name in removed, scores.get(block.name))
            for block in blocks.found]


def fit_units(plan: PruningPlan, units: Sequence[ChannelUnit]) -> List[UnitPlan]:
    """Turn the units of a plan into those that a model has without the plan's blocks.

    Someone may have let other blocks go or stay than those that the plan was made with. Layers of
    blocks may thus be missing or new, and units may become one, or several, which then lose the
    same channels; new ones lose none. What has nothing to do with blocks is left to be compared
    with the model.

    Args:
        plan (PruningPlan): The plan.
        units (Sequence[ChannelUnit]): The units of the model without the blocks.

    Returns:
        list[UnitPlan]: The plan's units.

    Raises:
        PruningError: Units that have become one lose different channels.
    """
    blocks = tuple(f'{block.name}.' for block in plan.blocks)
    if not blocks:
        return plan.units
    found, used = [], set()
    present = {item.module for unit in units for item in unit.side('out')}
    for unit in units:
        layers = {item.module for item in unit.side('out')}
        parts = [item for item in plan.units if layers & set(item.layers)]
        used |= {item.name for item in parts}
        if any((item.size, item.removed) != (parts[0].size, parts[0].removed) for item in parts):
            raise PruningError(f'without the removed blocks the units {parts[0].name!r} and '
                               f'{parts[1].name!r} of the plan are one, but it removes different '
                               'channels of them')
        known = {layer: group for item in parts for layer, group in item.layers.items()
                 if layer in layers or not (layer in present or layer.startswith(blocks))}
        known.update({layer: known.get(layer, '') for layer in layers
                      if layer.startswith(blocks)})
        if parts:
            found.append(UnitPlan(unit.name, known, parts[0].size, parts[0].removed))
        elif known:
            found.append(UnitPlan(unit.name, known, unit.size, []))
    return found + [item for item in plan.units if item.name not in used
                    and not all(layer.startswith(blocks) for layer in item.layers)]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The settings of spatial pruning."""
from dataclasses import dataclass, fields
from typing import Optional, Sequence

from mmgcp.errors import PruningError, shown
from mmgcp.utils.checks import (
    COUNT,
    LOSS_WEIGHT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Check,
    check_keys,
    check_value,
    list_of,
    number_in,
)

OWNER = 'spatial_cfg'
ODD = Check(lambda value: number_in(1, 255, integer=True).passes(value) and value % 2 == 1,
            'must be an odd number of cells from 1 to 255')
TILE = Check(lambda value: number_in(4, 256, integer=True).passes(value) and value % 4 == 0,
             'must be a multiple of 4 cells from 4 to 256')
CHECKS = dict(
    levels=list_of(COUNT, 'must be a list of strides'), tau=SHARE, tile=TILE, window=ODD,
    box_cells=POSITIVE, loss_weight=LOSS_WEIGHT, gamma=NOT_NEGATIVE, alpha=SHARE,
    dense_above=SHARE)


@dataclass(frozen=True)
class SpatialSettings:
    """How the cells of the finest levels are pruned.

    Attributes:
        levels: Strides in pixels of the levels that are pruned, the finest ones of the head;
            None stands for the finest one.
        tau: A cell is dropped if it should be kept with a probability of less than 1 - tau; 1
            drops none.
        tile: Side in cells of the tiles that are computed as a whole.
        window: Side in cells of the square around a box's centre that is to be kept.
        box_cells: A box belongs to the finest level at which the root of its area is below so
            many cells.
        loss_weight: Weight of the loss of the masks.
        gamma, alpha: Exponent and weight of positives of the focal loss.
        dense_above: Share of tiles above which a level is computed as a whole instead.
    """
    levels: Optional[Sequence[int]] = None
    tau: float = 0.4
    tile: int = 16
    window: int = 7
    box_cells: float = 8.
    loss_weight: float = 0.01
    gamma: float = 2.
    alpha: float = 0.25
    dense_above: float = 0.4


def read_settings(spatial_cfg: dict) -> SpatialSettings:
    """Check a user's settings; one that is wrong raises a PruningError."""
    check_keys(spatial_cfg, [field.name for field in fields(SpatialSettings)], OWNER, PruningError)
    for name, value in spatial_cfg.items():
        if not (name == 'levels' and value is None):
            check_value(f'{name} of {OWNER}', value, CHECKS[name], PruningError)
    return SpatialSettings(**spatial_cfg)


def pruned_levels(settings: SpatialSettings, strides: Sequence[int]) -> int:
    """Count the pruned levels of a head with these strides, the smallest first.

    Raises:
        PruningError: They are not the finest ones, or no level would be left to decide.
    """
    wanted = sorted(settings.levels or strides[:1])
    if len(strides) < 2 or wanted != list(strides[:-1])[:len(wanted)]:
        raise PruningError(
            f'levels of {OWNER} must be the smallest strides of the head, without its largest '
            f'one, but are {shown(wanted)} where the head has {shown(list(strides))}')
    for fine, coarse in zip(strides, strides[1:len(wanted) + 1]):
        if coarse % fine:
            raise PruningError(f'the stride {coarse} is no multiple of the next smaller one, '
                               f'{fine}: its cells cannot decide')
    return len(wanted)

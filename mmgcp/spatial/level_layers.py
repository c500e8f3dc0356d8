# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers that compute the predictions of one level alone, run on tiles."""
import copy
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError, told
from mmgcp.nn.hooks import on_inputs
from mmgcp.nn.temporarily import eval_mode

from .tiles import cut, inside, paste

PROBE = 32  # cells of the map on which the margin is measured
MOST = 12  # cells of the margin
TOLERANCE = 1e-9
CHUNK = 32  # tiles that are computed together


class LevelLayers:
    """What computes the predictions of a level: a part of the neck, if any, and of the head.

    Its inputs are maps that have been computed before: one for each argument of the part of the
    neck, the last one with the stride of the level, others perhaps coarser; or what the head
    reads. How far beyond a tile its layers look (``halo``, in cells) is measured.

    Args:
        head_module (nn.Module): Module that maps a map for each level to lists of predictions.
        level (int): Index of the level.
        channels (Sequence[int]): Number of channels of each map that the head reads.
        part (nn.Module, optional): The part of the neck. Defaults to None.
        inputs (Sequence[tuple[int, int]]): For each input its number of channels and its stride
            in cells of the level.

    Raises:
        PruningError: These layers cannot be computed tile by tile.
    """

    def __init__(self, head_module: nn.Module, level: int, channels: Sequence[int],
                 part: Optional[nn.Module], inputs: Sequence[Tuple[int, int]], tile: int,
                 what: str):
        self.head_module, self.level, self.channels = head_module, level, tuple(channels)
        self.part, self.inputs, self.tile, self.what = part, tuple(inputs), tile, what
        self.ratio = max(ratio for _, ratio in inputs)
        if tile % self.ratio:
            raise PruningError(f'a tile of {tile} cells cannot be cut out of a map of the stride '
                               f'of {self.ratio} cells')
        self._halo: Optional[int] = None
        if next(head_module.parameters()).device.type != 'meta':  # on which there are no values
            self._halo = self._measure()

    @property
    def halo(self) -> int:
        """Width of the margin of a tile in cells."""
        if self._halo is None:
            self._halo = self._measure()
        return self._halo

    def __call__(self, inputs: Sequence[Tensor]) -> List[Tensor]:
        """Return the predictions (N, C, H, W) of each kind, computed of whole maps."""
        maps = [inputs[0].new_zeros(1, number, 1, 1) for number in self.channels]
        maps[self.level] = inputs[0] if self.part is None else self.part(*inputs)
        # Not a call of the module, which would run hooks on it
        return [kind[self.level] for kind in self.head_module.forward(tuple(maps))]

    def on_tiles(self, inputs: Sequence[Tensor], places: Tensor) -> List[Tensor]:
        """Return what the call would, at the places (T, 3) of tiles, and zero elsewhere."""
        size = (len(inputs[-1]), *inputs[-1].shape[-2:])
        chunks = [self._run(inputs, part, size) for part in places.split(CHUNK)]
        return [paste(torch.cat(kind), places, size) for kind in zip(*chunks)]

    def _run(self, inputs: Sequence[Tensor], places: Tensor, size: Sequence[int]) -> List[Tensor]:
        """Compute tiles without their margins, of each kind."""
        halo, tile = self.halo, self.tile
        tiles = [cut(maps, places, tile // ratio, halo // ratio)
                 for maps, (_, ratio) in zip(inputs, self.inputs)]
        if not halo:
            return self(tiles)
        within = inside(places, tile, halo, size[1:])
        outputs = self(tiles) if within.all() else self._run_at_border(tiles, within)
        return [kind[:, :, halo:-halo, halo:-halo] for kind in outputs]

    def _run_at_border(self, tiles: Sequence[Tensor], within: Tensor) -> List[Tensor]:
        """Compute tiles of which parts are outside of the map, where convolutions read zeros."""
        def zero_outside(maps: Tensor) -> Optional[Tensor]:
            if maps.shape[-2:] == within.shape[-2:]:  # not those of other levels
                return maps * within.to(maps.dtype)
            return None

        modules = nn.ModuleList([self.head_module, *filter(None, [self.part])])
        wide = [name for name, module in modules.named_modules()
                if any(side > 1 for side in _kernel(module))]
        with on_inputs(modules, dict.fromkeys(wide, zero_outside)):
            return self(tiles)

    def _measure(self) -> int:
        """Measure the margin, and compare tiles with whole maps in double precision."""
        twin = copy.copy(self)
        twin.head_module, twin.part = copy.deepcopy((self.head_module, self.part))
        modules = nn.ModuleList([twin.head_module, *filter(None, [twin.part])])
        modules.double().cpu()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), eval_mode(modules):
                torch.manual_seed(0)
                reach = twin._reach()
                twin._halo = -(-reach // self.ratio) * self.ratio
                same = reach <= MOST and twin._compare()
        except PruningError:
            raise
        except Exception as error:  # whatever layers raise that do not run on tiles
            raise PruningError(f'{self._refused()}: {told(error)}') from error
        if not same:
            raise PruningError(self._refused())
        return twin._halo

    def _refused(self) -> str:
        return (f'{self.what} cannot be computed tile by tile, because a cell depends on more '
                'than its surroundings')

    def _reach(self) -> int:
        """Find how far a value that is no number spreads, in cells."""
        farthest, centre = 0, PROBE // 2
        for number, (_, ratio) in enumerate(self.inputs):
            maps = self._noise(PROBE, PROBE)
            maps[number][..., centre // ratio, centre // ratio] = float('nan')
            for kind in self(maps):
                _check_size(kind, PROBE, PROBE, self._refused())
                cells = kind.isnan().any(1)[0].nonzero()
                if len(cells):
                    first, last = int(cells.min()), int(cells.max())
                    farthest = max(farthest, centre - first, last - (centre + ratio - 1))
        return farthest

    def _compare(self) -> bool:
        """Whether tiles are as in whole maps, at all edges and in the middle."""
        height, width = self.tile + 2 * self.ratio, 2 * self.tile
        maps = self._noise(height, width)
        places = torch.tensor([[0, row, column] for row in range(2) for column in range(2)])
        return all(torch.allclose(whole, tiled, rtol=TOLERANCE, atol=TOLERANCE)
                   for whole, tiled in zip(self(maps), self.on_tiles(maps, places)))

    def _noise(self, height: int, width: int) -> List[Tensor]:
        return [torch.randn(1, channels, height // ratio, width // ratio, dtype=torch.double)
                for channels, ratio in self.inputs]


def _kernel(module: nn.Module) -> Tuple[int, ...]:
    """The sides of the kernel of a convolution; those of other modules have none."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        return tuple(module.kernel_size)
    return ()


def _check_size(kind: Tensor, height: int, width: int, refused: str) -> None:
    if kind.dim() != 4 or tuple(kind.shape[-2:]) != (height, width):
        raise PruningError(refused)

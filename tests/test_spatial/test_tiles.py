# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch

from mmgcp.spatial.tiles import active_places, cut, inside, paste


@pytest.mark.parametrize('height, width', [(12, 16), (13, 18), (4, 4), (3, 9)])
def test_all_tiles_are_the_map(height, width):
    maps = torch.rand(2, 3, height, width)
    places = active_places(torch.ones(2, 1, height, width, dtype=torch.bool), 4)
    assert len(places) == 2 * -(-height // 4) * -(-width // 4)
    assert torch.equal(paste(cut(maps, places, 4, 0), places, (2, height, width)), maps)


def test_tile_by_hand():
    maps = torch.arange(60.).view(1, 1, 6, 10)
    assert cut(maps, torch.tensor([[0, 1, 2]]), 4, 1).tolist() == [[[
        [37, 38, 39, 0, 0, 0], [47, 48, 49, 0, 0, 0], [57, 58, 59, 0, 0, 0],
        [0] * 6, [0] * 6, [0] * 6]]]
    within = inside(torch.tensor([[0, 0, 0], [0, 1, 2]]), 4, 1, (6, 10))
    assert within[0, 0].tolist() == [[False] * 6] + 5 * [[False] + [True] * 5]
    assert within[1, 0].tolist() == 3 * [[True] * 3 + [False] * 3] + 3 * [[False] * 6]


def test_places():
    keep = torch.zeros(3, 1, 10, 10, dtype=torch.bool)
    keep[0, 0, 9, 0] = keep[2, 0, 3, 4] = keep[2, 0, 2, 7] = True
    assert active_places(keep, 4).tolist() == [[0, 2, 0], [2, 0, 1]]
    assert active_places(keep & False, 4).shape == (0, 3)


def test_some_tiles():
    maps = torch.rand(2, 3, 8, 8) + 1
    places = torch.tensor([[0, 0, 1], [1, 1, 0]])
    found = paste(cut(maps, places, 4, 2)[:, :, 2:-2, 2:-2], places, (2, 8, 8))
    expected = torch.zeros_like(maps)
    expected[0, :, :4, 4:] = maps[0, :, :4, 4:]
    expected[1, :, 4:, :4] = maps[1, :, 4:, :4]
    assert torch.equal(found, expected)

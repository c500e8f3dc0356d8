# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch

from mmgcp.pruning.compensation import rounds
from mmgcp.pruning.compensation.rounds import Round, make_rounds


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(rounds, 'ROUND_IMAGES', 4)
    monkeypatch.setattr(rounds, 'ROUND_PIXELS', 4 * 10 * 10)


def numbered_images(*sizes):
    """Batches of so many images of a height and width, each with its number as its values."""
    batches, number = [], 0
    for count, height, width in sizes:
        values = torch.arange(number, number + count).float().view(-1, 1, 1, 1)
        batches.append(values.expand(count, 3, height, width))
        number += count
    return batches


def images_of(batches):
    return [item.images[:, 0, 0, 0].tolist() for item in make_rounds(batches)]


@pytest.mark.parametrize('count', [1, 2, 4])
def test_batches_are_joined(count):
    batches = numbered_images(*[(count, 10, 10)] * (8 // count))
    found = list(make_rounds(batches))
    assert [item.numbers for item in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert images_of(batches) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_last_round_is_smaller():
    assert images_of(numbered_images((2, 10, 10), (2, 10, 10), (1, 10, 10))) == [[0, 1, 2, 3], [4]]


def test_batches_that_are_larger_than_a_round():
    assert images_of(numbered_images((5, 10, 10), (5, 10, 10))) == [[0, 1, 2, 3, 4],
                                                                    [5, 6, 7, 8, 9]]


def test_large_images_are_fewer():
    assert images_of(numbered_images(*[(1, 14, 14)] * 4)) == [[0, 1], [2, 3]]
    assert images_of(numbered_images(*[(1, 30, 30)] * 2)) == [[0], [1]]


def test_images_of_different_sizes():
    first, = make_rounds(numbered_images((1, 10, 8), (1, 6, 10)))
    assert first.images.shape == (2, 3, 10, 10)
    image = first.images[1]
    assert (image[:, :6] == 1).all() and not image[:, 6:].any()
    assert not first.images[0, :, :, 8:].any()


def test_no_images():
    assert list(make_rounds([])) == []


def test_places_are_drawn_once_for_a_size():
    item = Round([3, 4], None)
    maps = torch.zeros(2, 20, 20, 7)
    places = item.choose(maps)
    assert len(places.row) == 2 * rounds.PLACES
    assert item.choose(maps[..., :2]) is places
    assert len(item.choose(torch.zeros(2, 5, 5, 1)).row) == 50

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.pruning.constraints import constrain
from mmgcp.pruning.structures import ChannelSlice, CoupledChannels, PruningError


def piece(name, channels, roots, side='out'):
    return ChannelSlice(name, side, torch.tensor(channels), torch.tensor(roots))


def make(size, *pieces):
    return CoupledChannels('set', size, pieces)


def test_nothing_to_constrain():
    coupled = make(4, piece('conv', [0, 1, 2, 3], [0, 1, 2, 3]))
    assert constrain(coupled, dict(conv=nn.Conv2d(3, 4, 1))) is coupled


def test_norms_that_overlap_join_their_units():
    coupled = make(6, piece('first', [0, 1, 2, 3], [0, 1, 2, 3]),
                   piece('second', [0, 1, 2, 3], [5, 3, 4, 1]))
    found = constrain(coupled, dict(first=nn.GroupNorm(2, 4), second=nn.GroupNorm(2, 4)))
    # 0-1 and 2-3 in the first, 5-3 and 4-1 in the second
    assert found.units.tolist() == [0, 0, 1, 1, 0, 1]
    assert found.blocks is None


def test_norm_group_of_two_sets():
    coupled = make(3, piece('norm', [0, 1, 2], [0, 1, 2]))
    with pytest.raises(PruningError, match='not all channels of a group of the GroupNorm norm'):
        constrain(coupled, dict(norm=nn.GroupNorm(2, 4)))


def test_both_sides_of_grouped_convolutions():
    coupled = make(6, piece('a', [2, 3, 0, 1], [0, 1, 2, 3]),
                   piece('b', [0, 1, 2, 3], [2, 3, 0, 1], 'in'))
    found = constrain(coupled, dict(a=nn.Conv2d(4, 4, 1, groups=2),
                                    b=nn.Conv2d(4, 2, 1, groups=2)))
    assert found.blocks.tolist() == [1, 1, 0, 0, -1, -1]
    assert found.units is None


@pytest.mark.parametrize('layers, message', [
    (dict(a=nn.Conv2d(4, 4, 1, groups=2), b=nn.Conv2d(4, 4, 1, groups=2)),
     'a and b divide its channels differently'),
    (dict(a=nn.Conv2d(6, 6, 1, groups=2), b=nn.Conv2d(4, 4, 1, groups=2)),
     'only some channels of the grouped convolution a'),
    (dict(a=nn.Conv2d(4, 4, 1, groups=2), b=nn.GroupNorm(2, 4)),
     'both the GroupNorm b and the grouped convolution a')])
def test_constraints_that_cannot_be_met(layers, message):
    coupled = make(4, piece('a', [0, 1, 2, 3], [0, 1, 2, 3]),
                   piece('b', [0, 1, 2, 3], [0, 2, 1, 3]))
    with pytest.raises(PruningError, match=message):
        constrain(coupled, layers)

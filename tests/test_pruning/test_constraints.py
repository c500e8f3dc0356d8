# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.pruning import ChannelSlice, ChannelUnit
from mmgcp.pruning.graph import constrain


def make_unit(size, *pieces):
    """A unit with a slice for each layer, side, channels and their indices in the unit."""
    return ChannelUnit('conv', size, (
        ChannelSlice('conv', 'out', torch.arange(size), torch.arange(size)),
        *(ChannelSlice(name, side, torch.tensor(channels), torch.tensor(unit_index))
          for name, side, channels, unit_index in pieces)))


def constrained(unit, **layers):
    return constrain(unit, dict(conv=nn.Conv2d(3, unit.size, 1), **layers))


def test_free_unit():
    unit = make_unit(4, ('bn', 'out', range(4), range(4)), ('depth', 'out', range(4), range(4)),
                     ('next', 'in', range(4), range(4)))
    found = constrained(unit, bn=nn.BatchNorm2d(4), depth=nn.Conv2d(4, 4, 1, groups=4),
                        next=nn.Conv2d(4, 4, 1))
    assert found is unit


def test_groups_of_a_norm():
    found = constrained(make_unit(6, ('gn', 'out', range(6), range(6))), gn=nn.GroupNorm(3, 6))
    assert found.norm_groups.tolist() == [0, 0, 1, 1, 2, 2] and found.conv_groups is None
    assert (found.name, found.size, len(found.slices)) == ('conv', 6, 2)


def test_norm_groups_follow_the_channels_of_the_norm():
    # the norm has the channels of the unit in the order 5, 3, 1, 4, 2, 0
    found = constrained(make_unit(6, ('gn', 'out', range(6), [5, 3, 1, 4, 2, 0])),
                        gn=nn.GroupNorm(2, 6))
    assert found.norm_groups.tolist() == [0, 1, 0, 1, 0, 1]


def test_groups_of_several_norms_are_joined():
    # pairs 0-1, 2-3, 4-5, 6-7 by the first, and 1-2 by the second, which has nothing else
    found = constrained(
        make_unit(8, ('gn', 'out', range(8), range(8)), ('other', 'out', [0, 1], [1, 2])),
        gn=nn.GroupNorm(4, 8), other=nn.GroupNorm(1, 2))
    assert found.norm_groups.tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


def test_norms_that_overlap():
    # 0-1 and 2-3 in the first, 5-3 and 4-1 in the second
    found = constrained(
        make_unit(6, ('first', 'out', range(4), range(4)),
                  ('second', 'out', range(4), [5, 3, 4, 1])),
        first=nn.GroupNorm(2, 4), second=nn.GroupNorm(2, 4))
    assert found.norm_groups.tolist() == [0, 0, 1, 1, 0, 1]


def test_channels_of_no_norm_are_groups_of_their_own():
    found = constrained(make_unit(4, ('gn', 'out', [2, 3], [1, 2])), gn=nn.GroupNorm(2, 4))
    assert found.norm_groups.tolist() == [0, 1, 1, 2]


def test_norm_that_has_channels_twice():
    found = constrained(make_unit(4, ('gn', 'out', range(8), [0, 1, 2, 3, 0, 1, 2, 3])),
                        gn=nn.GroupNorm(4, 8))
    assert found.norm_groups.tolist() == [0, 0, 1, 1]
    # its groups have 0 1, 2 0 and 1 2
    found = constrained(make_unit(3, ('gn', 'out', range(6), [0, 1, 2, 0, 1, 2])),
                        gn=nn.GroupNorm(3, 6))
    assert found.norm_groups.tolist() == [0, 0, 0]


def test_instance_like_group_norm():
    found = constrained(make_unit(4, ('gn', 'out', range(4), range(4))), gn=nn.GroupNorm(4, 4))
    assert found.norm_groups.tolist() == [0, 1, 2, 3]


def test_part_of_a_group():
    with pytest.raises(PruningError, match='group of the GroupNorm gn are coupled'):
        constrained(make_unit(3, ('gn', 'out', [0, 1, 2], [0, 1, 2])), gn=nn.GroupNorm(2, 4))


@pytest.mark.parametrize('conv, side', [
    (nn.Conv2d(6, 4, 1, groups=2), 'in'), (nn.Conv2d(4, 6, 1, groups=2), 'out'),
    (nn.ConvTranspose2d(6, 4, 1, groups=2), 'in')])
def test_groups_of_a_convolution(conv, side):
    found = constrained(make_unit(6, ('grouped', side, range(6), range(6))), grouped=conv)
    assert found.conv_groups.tolist() == [0, 0, 0, 1, 1, 1] and found.norm_groups is None


def test_conv_groups_follow_the_channels_of_the_convolution():
    found = constrained(make_unit(4, ('grouped', 'in', range(4), [3, 0, 2, 1])),
                        grouped=nn.Conv2d(4, 8, 1, groups=2))
    assert found.conv_groups.tolist() == [0, 1, 1, 0]


def test_channels_that_are_not_in_the_convolution_are_free():
    found = constrained(make_unit(6, ('grouped', 'in', range(4), [1, 2, 4, 5])),
                        grouped=nn.Conv2d(4, 8, 1, groups=2))
    assert found.conv_groups.tolist() == [-1, 0, 0, -1, 1, 1]


def test_convolutions_that_agree():
    found = constrained(
        make_unit(6, ('first', 'out', [2, 3, 0, 1], [0, 1, 2, 3]),
                  ('second', 'in', [0, 1, 2, 3], [2, 3, 0, 1])),
        first=nn.Conv2d(8, 4, 1, groups=2), second=nn.Conv2d(4, 8, 1, groups=2))
    assert found.conv_groups.tolist() == [1, 1, 0, 0, -1, -1]


def test_convolutions_that_disagree():
    with pytest.raises(PruningError, match='first and second divide its channels differently'):
        constrained(
            make_unit(6, ('first', 'out', range(6), range(6)),
                          ('second', 'in', range(6), range(6))),
            first=nn.Conv2d(6, 6, 1, groups=2), second=nn.Conv2d(6, 6, 1, groups=3))


@pytest.mark.parametrize('channels, unit_index', [
    ([0, 1, 2], [0, 1, 2]),  # of four
    ([0, 1, 2, 3], [0, 1, 0, 1])])  # each twice
def test_part_of_a_convolution(channels, unit_index):
    with pytest.raises(PruningError, match='only some channels of the grouped convolution g'):
        constrained(make_unit(3, ('g', 'in', channels, unit_index)), g=nn.Conv2d(4, 8, 1, groups=2))


def test_norm_and_convolution():
    with pytest.raises(PruningError, match='both the GroupNorm gn and the grouped convolution g'):
        constrained(
            make_unit(4, ('g', 'in', range(4), range(4)), ('gn', 'out', range(4), range(4))),
            g=nn.Conv2d(4, 8, 1, groups=2), gn=nn.GroupNorm(2, 4))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The units of a model that has lost channels are those that tracing it would find."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_kinds import KINDS, first_part, make_kind, some_of_each
from pruning_samples import Block, Toy, difference, randomise, run, two_branches

from mmgcp.pruning.graph import find_units
from mmgcp.pruning.remaining import remaining_channels, remaining_units, with_gone_channels
from mmgcp.pruning.scored import ScoredUnit
from mmgcp.pruning.surgery import remove_channels
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

SHAPE = (3, 16, 20)
NAN, LOW = float('nan'), -float('inf')


def content(units):
    """What units say, in an order that does not depend on the way in which they were found."""
    return {unit.name: (
        unit.size,
        {(item.module, item.side): sorted(zip(item.channels.tolist(), item.unit_index.tolist()))
         for item in unit.slices},
        unit.norm_groups is not None and unit.norm_groups.tolist(),
        unit.conv_groups is not None and unit.conv_groups.tolist()) for unit in units}


def assert_traced_the_same(model, units, removed, shape=SHAPE):
    remove_channels(model, units, removed)
    found, _ = find_units(model, shape)
    assert content(remaining_units(units, removed)) == content(found)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kind', [*KINDS, 'two_branches'])
def test_units_are_those_of_the_smaller_model(kind, seed):
    model = two_branches() if kind == 'two_branches' else make_kind(kind)
    units, _ = find_units(model, SHAPE)
    removed = first_part(units, some_of_each(units, seed))
    assert removed
    assert_traced_the_same(model, units, removed)


def test_units_of_a_detector(model, units):
    removed = {unit.name: torch.arange(number % unit.size)
               for number, unit in enumerate(units) if number % unit.size}
    assert_traced_the_same(model, units, removed, (3, 64, 64))


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('kind', KINDS)
def test_two_goes_are_one(kind, seed):
    """The same channels are left, with the same weights."""
    first = make_kind(kind)
    second, (units, _) = copy.deepcopy(first), find_units(first, SHAPE)
    removed = some_of_each(units, seed)
    gone = first_part(units, removed)
    remove_channels(first, units, removed)
    remove_channels(second, units, gone)
    remove_channels(second, remaining_units(units, gone), remaining_channels(removed, gone))
    expected, found = first.state_dict(), second.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert repr(first) == repr(second)  # channels and groups of all layers


def test_nothing_is_gone():
    units, _ = find_units(two_branches(), SHAPE)
    assert remaining_units(units, {}) == units
    removed = {'a.conv': torch.tensor([1, 4])}
    assert remaining_channels(removed, {})['a.conv'].tolist() == [1, 4]


def test_channels_to_remove():
    removed = {'a': torch.tensor([0, 2, 3, 7, 8]), 'b': torch.tensor([1, 2]), 'c': torch.arange(2)}
    gone = {'a': torch.tensor([0, 3, 7]), 'b': torch.tensor([1, 2])}
    found = remaining_channels(removed, gone)
    # of 0 to 9 without 0, 3 and 7, channel 2 is the second and 8 is the sixth
    assert {name: channels.tolist() for name, channels in found.items()} == {
        'a': [1, 5], 'c': [0, 1]}


def test_scores_of_gone_channels():
    """They are lower than any other, in those layers that had them."""
    def piece(module, channels):
        return ChannelSlice(module, 'out', torch.arange(len(channels)), torch.tensor(channels))

    unit = ChannelUnit('a', 5, (piece('a', [0, 1, 2, 3, 4]), piece('b', [2, 3, 4])))
    gone = {'a': torch.tensor([1, 3])}
    (left, ) = remaining_units([unit], gone)
    assert [item.unit_index.tolist() for item in left.slices] == [[0, 1, 2], [1, 2]]
    votes = ScoredUnit(left, dict(a=torch.tensor([.5, .7, .6]), b=torch.tensor([NAN, .2, .1])), {})
    (found, ) = with_gone_channels([votes], [unit], gone)
    assert found.unit is unit
    for layer, expected in (('a', [.5, LOW, .7, LOW, .6]), ('b', [NAN, NAN, .2, LOW, .1])):
        torch.testing.assert_close(found.scores[layer], torch.tensor(expected), equal_nan=True)


def test_parameter_with_a_single_channel_left():
    """It has no dimension of channels any more, while the unit goes on losing others."""
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x) * net.factor, net.b(x)), 1) + net.c(x)),
        c=Block(3, 8), a=Block(3, 4), b=Block(3, 4), pred=nn.Conv2d(8, 2, 1)))
    model.factor = nn.Parameter(torch.linspace(0.5, 2, 4).view(1, 4, 1, 1))
    (unit, ), _ = find_units(model, SHAPE)
    once = copy.deepcopy(model)
    gone, removed = ({unit.name: torch.tensor(channels)} for channels in ([0, 1, 3],
                                                                          [0, 1, 3, 5, 6]))
    remove_channels(once, [unit], removed)
    remove_channels(model, [unit], gone)
    remove_channels(model, remaining_units([unit], gone), remaining_channels(removed, gone))
    assert difference(run(once, 16), run(model, 16)) == 0. and model.pred.in_channels == 3

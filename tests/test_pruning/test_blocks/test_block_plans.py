# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest
import torch

from mmgcp.errors import PruningError
from mmgcp.pruning import BlockPlan, ChannelSlice, ChannelUnit, PruningPlan, UnitPlan
from mmgcp.pruning.blocks import Block, Blocks
from mmgcp.pruning.blocks.plans import check_names, fit_units, plan_blocks

BLOCKS = Blocks([Block('row.0', 'residual', 'last'), Block('row.1', 'plain')],
                {'down': 'it turns 1x1x1 into 2x1x1 (channels, height, width)'})


def unit(*layers, size=4):
    everything = torch.arange(size)
    return ChannelUnit(layers[0], size, tuple(
        ChannelSlice(layer, 'out', everything, everything) for layer in layers))


def plan(*units, blocks=('row.0', 'row.1')):
    return PruningPlan(list(units), blocks=[BlockPlan(name, 'plain', False) for name in blocks])


def item(*layers, removed=(0, 2)):
    return UnitPlan(layers[0], dict.fromkeys(layers, 'a'), 4, list(removed))


@pytest.mark.parametrize('names, message', [
    (['down'], "the block 'down' cannot be removed: it turns"),
    (['row.0', 'other'], "no block 'other' that can be removed: there are row.0, row.1$"),
    (['row.0', 'row.0'], "the block 'row.0' is to be removed twice"),
])
def test_names(names, message):
    check_names(['row.0', 'row.1'], BLOCKS)
    with pytest.raises(PruningError, match=message):
        check_names(names, BLOCKS)


def test_not_too_many_names_are_listed():
    blocks = Blocks([Block(f'row.{number}', 'plain') for number in range(40)], {})
    with pytest.raises(PruningError, match=r'row.11 and 28 more \(a plan lists them all\)$'):
        check_names(['other'], blocks)
    with pytest.raises(PruningError, match='can be removed: there are none$'):
        check_names(['other'], Blocks([], {}))


def test_blocks_of_a_plan():
    assert plan_blocks(BLOCKS, {'row.1': 0.5}, ['row.1']) == [
        BlockPlan('row.0', 'residual', False, None), BlockPlan('row.1', 'plain', True, 0.5)]


def test_units_lose_the_layers_of_blocks():
    before = plan(item('stem', 'row.0.last', 'row.1.last'), item('row.0.first'))
    assert fit_units(before, [unit('stem', 'row.1.last')]) == [item('stem', 'row.1.last')]


def test_a_unit_that_was_named_after_a_layer_of_a_block():
    before = plan(item('row.0.last', 'down'))
    assert fit_units(before, [unit('down')]) == [item('down')]


def test_blocks_that_come_back_lose_no_channels_of_their_own():
    found = fit_units(plan(item('stem')), [unit('stem', 'row.0.last'), unit('row.0.first')])
    assert found == [UnitPlan('stem', {'stem': 'a', 'row.0.last': ''}, 4, [0, 2]),
                     UnitPlan('row.0.first', {'row.0.first': ''}, 4, [])]


def test_units_that_become_one_have_to_lose_the_same_channels():
    parts = item('stem'), item('row.1.conv', 'row.0.last')
    units = [unit('stem', 'row.0.last')]
    assert fit_units(plan(*parts), units) == [item('stem', 'row.0.last')]
    parts[1].removed = [1]
    with pytest.raises(PruningError, match="the units 'stem' and 'row.1.conv' of the plan are one"):
        fit_units(plan(*parts), units)


def test_other_layers_are_left_to_be_compared():
    before = plan(item('stem', 'unknown'), item('another'))
    assert fit_units(before, [unit('stem')]) == [item('stem', 'unknown'), item('another')]
    before = plan(item('stem', 'row.0.last'), blocks=())
    assert fit_units(before, [unit('stem')]) == before.units


@pytest.mark.parametrize('blocks, message', [
    ({}, 'blocks of the plan .* must be a list, but is {}'),
    ([dict(name='a')], "block 0 of the plan must have .* where removed is true or false"),
    ([dict(name='a', kind='plain', removed=1, score=None)], 'block 0 of the plan must have'),
    ([dict(name='a', kind='plain', removed=True, score='low')], 'block 0 of the plan must have'),
])
def test_wrong_blocks_in_a_file(blocks, message, tmp_path):
    path = tmp_path / 'plan.json'
    plan(item('stem')).save(path)
    assert PruningPlan.load(path).blocks == plan(item('stem')).blocks
    path.write_text(json.dumps(dict(json.loads(path.read_text()), blocks=blocks)))
    with pytest.raises(PruningError, match=message):
        PruningPlan.load(path)

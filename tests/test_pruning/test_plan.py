# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import json
import re

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, randomise

from mmgcp.errors import PruningError
from mmgcp.pruning import ChannelSlice, ChannelUnit, PruningPlan, UnitPlan, prune, validate_plan


def make_unit(name, size, *layers, norm_groups=None, conv_groups=None):
    """A unit of convolutions with all of its channels."""
    every = torch.arange(size)
    return ChannelUnit(
        name, size, tuple(ChannelSlice(layer, 'out', every, every) for layer in (name, *layers)),
        None if norm_groups is None else torch.tensor(norm_groups),
        None if conv_groups is None else torch.tensor(conv_groups))


SETS = [
    make_unit('backbone.stem.conv', 4, 'backbone.stem.bn'),
    make_unit('neck.norm.conv', 6, norm_groups=[0, 0, 1, 1, 2, 2]),
    make_unit('neck.grouped.conv', 7, conv_groups=[0, 0, 0, 1, 1, 1, -1]),
    # the first half is of one layer, the second of another
    ChannelUnit('head.conv', 4, (
        ChannelSlice('head.conv', 'out', torch.arange(4), torch.arange(4)),
        ChannelSlice('head.first', 'in', torch.arange(2), torch.tensor([0, 1])),
        ChannelSlice('head.second', 'out', torch.arange(2), torch.tensor([2, 3])))),
]


def make_plan(**changes):
    """A plan that fits, but for changes of the units by name."""
    units = [
        UnitPlan('backbone.stem.conv', {'backbone.stem.conv': 'a', 'backbone.stem.bn': 'a'}, 4,
                [0, 2]),
        UnitPlan('neck.norm.conv', {'neck.norm.conv': ''}, 6, [2, 3]),
        UnitPlan('neck.grouped.conv', {'neck.grouped.conv': 'b'}, 7, [1, 2, 3, 5, 6]),
        UnitPlan('head.conv', {'head.conv': 'b', 'head.second': 'b'}, 4, [1, 2])]
    for number, key in enumerate(('stem', 'norm', 'grouped', 'head')):
        for name, value in changes.get(key, {}).items():
            setattr(units[number], name, value)
    return PruningPlan(units, {'a': 0.25, 'b': None}, {'pred': 'its outputs are the predictions'},
                       dict(ratio=0.5, input_shape=[3, 64, 64]))


def test_removed():
    plan = make_plan(norm=dict(removed=[]))
    found = plan.removed()
    assert {name: channels.tolist() for name, channels in found.items()} == {
        'backbone.stem.conv': [0, 2], 'neck.grouped.conv': [1, 2, 3, 5, 6], 'head.conv': [1, 2]}
    assert all(channels.dtype == torch.long for channels in found.values())


def test_round_trip(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / 'plan.json')
    assert PruningPlan.load(tmp_path / 'plan.json') == plan
    assert PruningPlan.load(str(tmp_path / 'plan.json')) == plan


def test_a_line_for_each_unit(tmp_path):
    """So that people can read and change it."""
    make_plan().save(tmp_path / 'plan.json')
    text = (tmp_path / 'plan.json').read_text()
    data = json.loads(text)
    assert list(data) == ['format', 'version', 'thresholds', 'skipped', 'options',
                          'skipped_blocks', 'blocks', 'units']
    assert (data['format'], data['version']) == ('mmgcp.pruning_plan', 2)
    lines = [line.strip(' ,') for line in text.splitlines() if '"removed"' in line]
    assert [json.loads(line) for line in lines] == data['units']
    assert data['units'][0] == dict(
        name='backbone.stem.conv', layers={'backbone.stem.conv': 'a', 'backbone.stem.bn': 'a'},
        size=4, removed=[0, 2])
    assert text.endswith('}\n')


def test_channels_in_any_order(tmp_path):
    make_plan(stem=dict(removed=[3, 0])).save(tmp_path / 'plan.json')
    plan = PruningPlan.load(tmp_path / 'plan.json')
    assert plan.units[0].removed == [0, 3]


def test_what_a_plan_need_not_have(tmp_path):
    item = dict(name='a', layers={}, size=2, removed=[])
    (tmp_path / 'plan.json').write_text(json.dumps(
        dict(format='mmgcp.pruning_plan', version=2, units=[item], comment='mine')))
    assert PruningPlan.load(tmp_path / 'plan.json') == PruningPlan([UnitPlan('a', {}, 2, [])])


def test_missing_file(tmp_path):
    with pytest.raises(PruningError, match=r'plan .*none\.json cannot be read: No such file'):
        PruningPlan.load(tmp_path / 'none.json')


def test_folder(tmp_path):
    with pytest.raises(PruningError, match='cannot be read: Is a directory'):
        PruningPlan.load(tmp_path)


@pytest.mark.parametrize('content', [b'', b'{"format": ', b'plan', b'\xff\xfe\x00'])
def test_file_that_is_not_json(tmp_path, content):
    (tmp_path / 'plan.json').write_bytes(content)
    with pytest.raises(PruningError, match=r'plan\.json is not JSON: '):
        PruningPlan.load(tmp_path / 'plan.json')


def edited(path, **changes):
    """Write a plan with other contents; None takes an entry away."""
    make_plan().save(path)
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edited_set(path, **changes):
    make_plan().save(path)
    units = json.loads(path.read_text())['units']
    units[1] = {key: value for key, value in {**units[1], **changes}.items() if value is not None}
    edited(path, units=units)


@pytest.mark.parametrize('changes, message', [
    (dict(format='mmgcp.report'), r'plan\.json is not a pruning plan'),
    (dict(format=None), 'is not a pruning plan'),
    (dict(version=1), r'plan\.json is of version 1; this mmgcp reads version 2'),
    (dict(version=None), 'is of version None'),
    (dict(units=None), r'plan\.json has no units'),
    (dict(units=[]), 'has no units'),
    (dict(units={'a': 1}), 'has no units'),
    (dict(units=['a']), r"unit 0 of the plan must have \['layers', 'name', 'removed', 'size'\]"),
    (dict(version='9' * 3000), r"is of version '9{99}\.\.\.; this"),
    (dict(thresholds=[1]), r'thresholds of the plan .*plan\.json must be numbers by layer group, '
                           r'but is \[1\]$'),
    (dict(thresholds='a'), "must be numbers by layer group, but is 'a'$"),
    (dict(thresholds=dict(a='0.5')), r"must be numbers by layer group, but is \{'a': '0.5'\}$"),
    (dict(thresholds=dict(a=True)), 'must be numbers by layer group'),
    (dict(thresholds=dict(a=float('nan'))), 'must be numbers by layer group'),
    (dict(skipped=['a']), r"skipped of the plan .* must be texts by layer, but is \['a'\]$"),
    (dict(skipped=dict(a=None)), 'must be texts by layer'),
    (dict(skipped=dict(a=['b'])), 'must be texts by layer'),
    (dict(options=[1]), r'options of the plan .* must be values by option, but is \[1\]$'),
    (dict(options=0), 'must be values by option, but is 0$'),
    (dict(options=dict(a='\ud800')), 'has a text that is not Unicode'),
    (dict(options=dict(a=10**50)), 'is not JSON: it has a number of 51 digits$'),
])
def test_file_that_is_no_plan(tmp_path, changes, message):
    edited(tmp_path / 'plan.json', **changes)
    with pytest.raises(PruningError, match=message):
        PruningPlan.load(tmp_path / 'plan.json')


@pytest.mark.parametrize('text, message', [
    ('[' * 200000, 'is nested too deep'),
    ('{"options": ' * 60 + '1' + '}' * 60, 'is nested too deep'),
    ('{"format": ' + '9' * 5000 + '}', 'is not JSON: it has a number of 5000 digits')])
def test_files_that_are_too_much(tmp_path, text, message):
    (tmp_path / 'plan.json').write_text(text)
    with pytest.raises(PruningError, match=f'the plan .*plan.json {message}$'):
        PruningPlan.load(tmp_path / 'plan.json')


def test_nul_in_a_path():
    with pytest.raises(PruningError, match=r"the plan 'a\\x00b' cannot be read: embedded null"):
        PruningPlan.load('a\0b')


def test_infinite_thresholds_are_read(tmp_path):
    """A group of which nothing or everything goes may have one."""
    edited(tmp_path / 'plan.json', thresholds=dict(a=-float('inf'), b=None, c=3))
    assert PruningPlan.load(tmp_path / 'plan.json').thresholds == dict(
        a=-float('inf'), b=None, c=3)


def test_long_names_are_cut():
    plan = make_plan(stem=dict(name='x' * 100000))
    with pytest.raises(PruningError, match="names the unit 'x{99}\\.\\.\\., which the model"):
        validate_plan(plan, SETS)


def test_list_instead_of_a_plan(tmp_path):
    (tmp_path / 'plan.json').write_text('[1, 2]')
    with pytest.raises(PruningError, match='is not a pruning plan'):
        PruningPlan.load(tmp_path / 'plan.json')


@pytest.mark.parametrize('changes, message', [
    (dict(size=None), 'unit 1 of the plan must have'),
    (dict(note='mine'), 'unit 1 of the plan must have'),
    (dict(layers=['neck.norm.conv']), 'unit 1 of the plan must have'),
    (dict(name=5), 'unit 1 of the plan must have'),
    (dict(removed='2'), '"removed" of the unit \'neck.norm.conv\' must be a list of integers'),
    (dict(removed=[1, '2']), "unit 'neck.norm.conv' must be a list of integers"),
    (dict(removed=[1.5]), "unit 'neck.norm.conv' must be a list of integers"),
    (dict(removed=[True]), "unit 'neck.norm.conv' must be a list of integers"),
    (dict(size='6'), '"size" of the unit \'neck.norm.conv\' must be a whole number, but is \'6\''),
    (dict(size=6.), 'must be a whole number, but is 6.0'),
    (dict(size=True), 'must be a whole number, but is True'),
    (dict(layers={'neck.norm.conv': 3}), 'unit 1 of the plan must have'),
    (dict(layers={'neck.norm.conv': None}), 'unit 1 of the plan must have'),
])
def test_set_that_cannot_be_read(tmp_path, changes, message):
    edited_set(tmp_path / 'plan.json', **changes)
    with pytest.raises(PruningError, match=re.escape(message)):
        PruningPlan.load(tmp_path / 'plan.json')


def test_plan_that_fits():
    validate_plan(make_plan(), SETS)
    validate_plan(make_plan(grouped=dict(removed=[0, 1, 3, 4])), SETS)
    validate_plan(make_plan(grouped=dict(removed=[6])), SETS)
    validate_plan(make_plan(norm=dict(removed=[5, 0, 1, 4])), SETS)
    validate_plan(make_plan(**{key: dict(removed=[]) for key in ('stem', 'norm', 'grouped',
                                                                 'head')}), SETS)


@pytest.mark.parametrize('changes, message', [
    (dict(stem=dict(name='backbone.stem.cnv')),
     "names the unit 'backbone.stem.cnv', which the model does not have; the closest is "
     "'backbone.stem.conv': is it the architecture that the plan was made for?"),
    (dict(stem=dict(name='xyz')), "'xyz', which the model does not have: is it the arch"),
    (dict(head=dict(name='neck.grouped.conv')), "names the unit 'neck.grouped.conv' twice"),
    (dict(stem=dict(size=8)), "for the unit 'backbone.stem.conv' is for 8 channels, but the model "
                              'has 4'),
    (dict(stem=dict(layers={'backbone.stem.conv': ''})),
     "'backbone.stem.conv' disagrees with the model about the layers that are coupled: "
     "'backbone.stem.bn' is not in the plan"),
    (dict(norm=dict(layers={'neck.norm.conv': '', 'neck.x': ''})), "'neck.x' is in the plan"),
    (dict(stem=dict(removed=[1, 4])), "'backbone.stem.conv' removes channel 4, but they are 0 to"),
    (dict(stem=dict(removed=[1, 9, 2])), 'removes channel 9, but they are 0 to 3'),
    (dict(stem=dict(removed=[-1, 2])), "'backbone.stem.conv' removes channel -1, but"),
    (dict(stem=dict(removed=[2, -1])), 'removes channel -1, but they are'),
    (dict(stem=dict(removed=[1, 1])), "'backbone.stem.conv' removes a channel twice"),
    (dict(stem=dict(removed=[3, 1, 2, 0])), "'backbone.stem.conv' removes all of its channels"),
    (dict(norm=dict(removed=[0, 1, 4])), "'neck.norm.conv' removes only some of the channels "
                                         '[4, 5]'),
    (dict(grouped=dict(removed=[0, 1, 3])), "'neck.grouped.conv' removes [2, 1] channels of the "
                                            'groups of a convolution; they have to be equally'),
    (dict(grouped=dict(removed=[3, 6])), 'removes [0, 1] channels of the groups'),
    (dict(grouped=dict(removed=[0, 1, 2, 3, 4, 5])), "'neck.grouped.conv' removes all channels of "
                                                     'the groups'),
    (dict(head=dict(removed=[0, 1])), "'head.conv' removes all of its channels that head.first "
                                      'has'),
    (dict(head=dict(removed=[2, 3, 0])), 'that head.second has; one has to stay'),
])
def test_plan_that_does_not_fit(changes, message):
    with pytest.raises(PruningError, match=re.escape(message)):
        validate_plan(make_plan(**changes), SETS)


def test_units_that_are_missing():
    plan = make_plan()
    plan.units = plan.units[:2]
    with pytest.raises(PruningError, match="lacks 2 of the units .* such as 'neck.grouped.conv'"):
        validate_plan(plan, SETS)


@pytest.fixture
def model():
    return randomise(Toy(
        lambda net, x: net.pred(net.grouped(net.norm(net.b(net.a(x))))), a=Block(3, 4),
        b=nn.Conv2d(4, 6, 1), norm=nn.Sequential(nn.GroupNorm(3, 6), nn.Conv2d(6, 6, 1)),
        grouped=nn.Conv2d(6, 4, 1, groups=2), pred=nn.Conv2d(4, 2, 1)))


def plan_for(model):
    """A plan that removes some of all units."""
    groups = [dict(name='all', modules=['a', 'b', 'norm', 'grouped'], ratio=0.)]
    plan = prune(model, groups, dry_run=True, input_shape=(3, 16, 16)).plan
    removed = {'a.conv': [1], 'b': [0, 1], 'norm.1': [2, 4], 'grouped': [1, 2]}
    assert [item.name for item in plan.units] == list(removed)
    for item in plan.units:
        item.removed = removed[item.name]
    return plan


def test_plan_is_carried_out(model):
    prune(model, plan=plan_for(model), input_shape=(3, 16, 16))
    assert [model.a.conv.out_channels, model.b.out_channels, model.norm[0].num_groups,
            model.norm[1].out_channels, model.grouped.out_channels] == [3, 4, 2, 4, 2]


@pytest.mark.parametrize('name, removed, message', [
    ('a.conv', [9], 'removes channel 9'), ('a.conv', [0, 1, 2, 3], 'removes all'),
    ('b', [0], "'b' removes only some"), ('norm.1', [0], "'norm.1' removes \\[1, 0\\]"),
    ('grouped', [0, 1, 2, 3], 'removes all')])
def test_refused_plan_leaves_the_model_alone(model, name, removed, message):
    plan = plan_for(model)
    (item, ) = [item for item in plan.units if item.name == name]
    item.removed = removed
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=message):
        prune(model, plan=plan, input_shape=(3, 16, 16))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.norm[0].num_groups == 3 and model.grouped.groups == 2


def test_plan_of_another_model(model):
    plan = plan_for(model)
    other = randomise(Toy(lambda net, x: net.pred(net.stem(x)), stem=Block(3, 4),
                          pred=nn.Conv2d(4, 2, 1)))
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(PruningError, match="'a.conv', which the model does not have"):
        prune(other, plan=plan, input_shape=(3, 16, 16))
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())

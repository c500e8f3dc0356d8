# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest
import torch

from mmgcp.pruning import PruningError, PruningPlan, SetPlan, validate_plan
from mmgcp.pruning.structures import ChannelSlice, CoupledChannels


def coupled(name, size, **constraints):
    channels = torch.arange(size)
    slices = (ChannelSlice(name, 'out', channels, channels),
              ChannelSlice('reader', 'in', channels, channels))
    return CoupledChannels(name, size, slices, **constraints)


SETS = [coupled('a.conv', 4), coupled('b.conv', 6, units=torch.tensor([0, 0, 1, 1, 2, 2])),
        coupled('c.conv', 4, blocks=torch.tensor([0, 0, 1, 1]))]


def make(**removed):
    names = dict(a='a.conv', b='b.conv', c='c.conv')
    return PruningPlan(
        [SetPlan(name, {name: 'group'}, item.size, removed.get(key, []))
         for (key, name), item in zip(names.items(), SETS)],
        thresholds=dict(group=0.5, other=None), skipped=dict(pred='reason'),
        options=dict(merge='or'))


def test_round_trip(tmp_path):
    plan = make(a=[1, 3], b=[2, 3], c=[0, 2])
    plan.save(tmp_path / 'plan.json')
    text = (tmp_path / 'plan.json').read_text()
    assert sum('"removed"' in line for line in text.splitlines()) == 3  # one line a set
    loaded = PruningPlan.load(tmp_path / 'plan.json')
    assert loaded == plan
    validate_plan(loaded, SETS)
    assert {name: channels.tolist() for name, channels in loaded.removed().items()} == {
        'a.conv': [1, 3], 'b.conv': [2, 3], 'c.conv': [0, 2]}


def test_indices_are_sorted(tmp_path):
    make(a=[3, 1]).save(tmp_path / 'plan.json')
    assert PruningPlan.load(tmp_path / 'plan.json').sets[0].removed == [1, 3]


@pytest.mark.parametrize('content, message', [
    (None, 'cannot be read: No such file'),
    ('{', 'is not JSON'),
    ('[]', 'is not a pruning plan'),
    ('{"format": "mmgcp.pruning_plan", "version": 2, "sets": []}', 'of version 2'),
    ('{"format": "mmgcp.pruning_plan", "version": 1, "sets": []}', 'has no sets'),
    ('{"format": "mmgcp.pruning_plan", "version": 1, "sets": [{"name": "a"}]}', 'set 0'),
])
def test_file_that_is_no_plan(content, message, tmp_path):
    path = tmp_path / 'plan.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(PruningError, match=message):
        PruningPlan.load(path)


@pytest.mark.parametrize('indices', [3, ['1'], [1.5], [True]])
def test_indices_that_are_no_integers(indices, tmp_path):
    make().save(tmp_path / 'plan.json')
    data = json.loads((tmp_path / 'plan.json').read_text())
    data['sets'][1]['removed'] = indices
    (tmp_path / 'plan.json').write_text(json.dumps(data))
    with pytest.raises(PruningError, match="'b.conv' must be a list of integers"):
        PruningPlan.load(tmp_path / 'plan.json')


@pytest.mark.parametrize('removed, message', [
    (dict(a=[4]), "'a.conv' removes channel 4, but they are 0 to 3"),
    (dict(a=[-1, 2]), 'removes channel -1'),
    (dict(a=[1, 1]), 'removes a channel twice'),
    (dict(a=[0, 1, 2, 3]), 'removes all of its channels'),
    (dict(b=[1]), r'only some of the channels \[0, 1\]'),
    (dict(c=[0]), r'removes \[1, 0\] channels of the groups'),
])
def test_indices_that_do_not_fit(removed, message):
    with pytest.raises(PruningError, match=message):
        validate_plan(make(**removed), SETS)


@pytest.mark.parametrize('change, message', [
    (lambda plan: plan.sets.pop(), "lacks 1 of the sets of the model, such as 'c.conv'"),
    (lambda plan: plan.sets.append(plan.sets[0]), "'a.conv' twice"),
    (lambda plan: setattr(plan.sets[0], 'name', 'a.conb'), "'a.conb'.*closest is 'a.conv'"),
    (lambda plan: setattr(plan.sets[0], 'size', 8), 'is for 8 channels, but the model has 4'),
    (lambda plan: plan.sets[0].layers.update(more='group'), "'more' is in the plan"),
    (lambda plan: plan.sets[0].layers.clear(), "'a.conv' is not in the plan"),
])
def test_plan_of_another_model(change, message):
    plan = make()
    change(plan)
    with pytest.raises(PruningError, match=message):
        validate_plan(plan, SETS)

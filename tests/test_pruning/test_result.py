# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest
import torch.nn as nn
from layer_kinds import KINDS, make_kind

from mmgcp.analysis import count_complexity
from mmgcp.pruning import BlockPlan, PruningPlan, PruningResult, UnitPlan, count_channels, prune

SHAPE = (3, 16, 20)


@pytest.fixture
def result():
    plan = PruningPlan(
        units=[UnitPlan('a.conv', {'a.conv': 'one', 'a.bn': 'one', 'b.conv': 'two'}, 8, [1, 2, 5]),
              UnitPlan('fc', {'fc': ''}, 6, [])],
        thresholds=dict(one=0.5, two=None), skipped=dict(pred='it is last'),
        options=dict(merge='or'), blocks=[BlockPlan('row.0', 'residual', True, 0.5)],
        skipped_blocks={'row.1': 'it is the last'})
    before = {'b.conv': [3, 8], 'a.conv': [3, 8], 'a.bn': [8], 'factor': [8], 'fc': [8, 6],
              'pred': [6, 2]}
    after = dict(before, **{'b.conv': [3, 5], 'a.conv': [3, 5], 'a.bn': [5], 'factor': [5],
                            'fc': [5, 6]})
    return PruningResult(nn.Identity(), plan, before, after, [100, 70], [1000, 600], {}, ['fc'])


def test_layers_are_those_with_weights_in_order(result):
    assert [tuple(row) for row in result.layers] == [
        ('b.conv', 'two', 8, 5), ('a.conv', 'one', 8, 5), ('fc', '', 6, 6), ('pred', '', 2, 2)]


def test_changed_channels(result):
    assert result.changed_channels == {
        'b.conv': [None, 5], 'a.conv': [None, 5], 'a.bn': [5], 'factor': [5], 'fc': [5, None]}


def test_report(result):
    assert result.report == dict(
        params=dict(before=100, after=70), macs=dict(before=1000, after=600),
        thresholds=dict(one=0.5, two=None), options=dict(merge='or'),
        layers=[dict(layer='b.conv', group='two', before=8, after=5),
                dict(layer='a.conv', group='one', before=8, after=5),
                dict(layer='fc', group='', before=6, after=6),
                dict(layer='pred', group='', before=2, after=2)],
        blocks=[dict(name='row.0', kind='residual', removed=True, score=0.5)],
        skipped_blocks={'row.1': 'it is the last'},
        skipped=dict(pred='it is last'), uncompensated=['fc'], fits={}, compensation='',
        recovery={}, accuracy={}, latency={})
    assert json.loads(json.dumps(result.report)) == result.report


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('ratio', [0.45, 0.6])
def test_figures_are_those_of_the_pruned_model(kind, ratio):
    model = make_kind(kind)
    before, complexity = count_channels(model), count_complexity(model, SHAPE)
    result = prune(model, [dict(name='all', modules=['*'])], ratio=ratio, merge='mean',
                   input_shape=SHAPE)
    assert result.channels_before == before
    assert result.channels_after == count_channels(model) != before
    after = count_complexity(model, SHAPE)
    assert [*zip(result.params, result.macs)] == [complexity, after]
    assert after[0] < complexity[0] and after[1] < complexity[1]
    assert result.changed_channels == {
        name: [new if new != old else None for old, new in zip(before[name], counts)]
        for name, counts in count_channels(model).items() if counts != before[name]}


def test_figures_by_hand():
    """Of twelve channels in four groups of a GroupNorm three go, of nine in three blocks six."""
    model = make_kind('group_norm')
    model.norm.weight.data = nn.Parameter(
        model.norm.weight.new_tensor([0.1] * 3 + [0.9] * 3 + [0.5] * 6))
    result = prune(model, [dict(name='norm', modules=['norm'], threshold=0.3)], input_shape=SHAPE)
    changed = {'a': [None, 9], 'norm': [9], 'b.conv': [9, None]}
    assert result.changed_channels == changed and model.norm.num_groups == 3
    assert result.params[0] - result.params[1] == 3 * 27 + 6 + 3 * 6

    model = make_kind('grouped')
    model.norm.weight.data = model.norm.weight.new_tensor([.1, .2, .9, .8, .1, .2, .1, .1, .7])
    result = prune(model, [dict(name='norm', modules=['norm'], threshold=0.3)], input_shape=SHAPE)
    assert result.changed_channels == {'parts': [None, 3], 'norm': [3], 'pred': [3, None]}
    assert result.plan.removed()['parts'].tolist() == [0, 1, 4, 5, 6, 7]
    assert result.params[0] - result.params[1] == 6 * (36 + 1 + 2 + 2)

    model = make_kind('parameter')
    model.a.bn.weight.data = model.a.bn.weight.new_tensor([.1, .9, .9, .9, .9, .9, .9, .1])
    result = prune(model, [dict(name='a', modules=['a'], threshold=0.3)], input_shape=SHAPE)
    assert result.changed_channels == {
        'a.conv': [None, 6], 'a.bn': [6], 'factor': [6], 'summand': [6], 'pred': [6, None]}
    assert result.params[0] - result.params[1] == 2 * (3 + 2 + 1 + 1 + 2)
    assert result.macs[0] - result.macs[1] == 320 * 2 * (3 + 2)

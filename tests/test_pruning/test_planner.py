# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, randomise

from mmgcp.pruning import BNScale
from mmgcp.pruning.dependency_graph import find_coupled_channels
from mmgcp.pruning.planner import (
    ScoredSet,
    choose_channels,
    group_scores,
    make_plan,
    score_sets,
    thresholds_of_groups,
)
from mmgcp.pruning.structures import ChannelSlice, CoupledChannels, LayerGroup, PruningError

A = LayerGroup('A', ('a', ))
B = LayerGroup('B', ('b', ))
NAN = float('nan')


def scored_set(scores, groups, name='set'):
    size = len(next(iter(scores.values())))
    slices = tuple(ChannelSlice(layer, 'out', torch.arange(size), torch.arange(size))
                   for layer in scores)
    return ScoredSet(CoupledChannels(name, size, slices),
                     {layer: torch.tensor(row) for layer, row in scores.items()}, groups)


def chosen(item, thresholds, merge='or', min_keep_ratio=0.01):
    return choose_channels(item, thresholds, merge, min_keep_ratio).tolist()


def test_ratio_is_taken_over_all_layers_of_a_group():
    items = [scored_set(dict(a1=[0.9, 0.1, 0.5]), dict(a1=A)),
             scored_set(dict(a2=[0.3, 0.7], b1=[0.01, 0.02]), dict(a2=A, b1=B))]
    group = LayerGroup('A', ('a', ), ratio=0.4)
    items = [ScoredSet(x.coupled, x.scores, {k: group if v is A else v
                                             for k, v in x.groups.items()}) for x in items]
    assert sorted(group_scores(items, group).tolist()) == pytest.approx([.1, .3, .5, .7, .9])
    assert thresholds_of_groups(items, [group, B]) == {'A': pytest.approx(0.3)}


@pytest.mark.parametrize('ratio, number', [
    (0., 0), (0.009, 0), (0.01, 1), (0.29, 29), (0.57, 57), (0.58, 58), (0.999, 99)])
def test_ratio_by_hand(ratio, number):
    group = LayerGroup('A', ('a', ), ratio=ratio)
    item = scored_set(dict(a=[1. + i for i in range(100)][::-1]), dict(a=group))
    thresholds = thresholds_of_groups([item], [group])
    assert thresholds == {'A': float(number) if number else None}
    assert len(chosen(item, thresholds)) == number


def test_stated_threshold():
    assert thresholds_of_groups([], [LayerGroup('A', ('a', ), threshold=0.25), B]) == {'A': 0.25}


def test_score_at_the_threshold_goes():
    item = scored_set(dict(a=[0.5, 0.25, 0.75]), dict(a=A))
    assert chosen(item, dict(A=0.5)) == [0, 1]


ROWS = dict(a=[0.9, 0.1, 0.9, 0.1], b=[0.9, 0.1, 0.1, 0.9], c=[0.9, 0.1, 0.9, 0.1],
            d=[0.9, 0.9, 0.1, 0.1])


def test_or_keeps_what_any_layer_keeps():
    item = scored_set(dict(ROWS, d=[0.1, 0.1, 0.1, 0.1]), {layer: A for layer in ROWS})
    assert chosen(item, dict(A=0.5), 'or') == [1]


def test_majority_keeps_what_more_than_half_keep():
    # votes: 4, 1, 2 (a tie), 1
    item = scored_set(ROWS, {layer: A for layer in ROWS})
    assert chosen(item, dict(A=0.5), 'majority') == [1, 2, 3]
    three = scored_set({layer: ROWS[layer] for layer in 'abc'}, {layer: A for layer in 'abc'})
    assert chosen(three, dict(A=0.5), 'majority') == [1, 3]


def test_unknown_merge():
    with pytest.raises(PruningError, match="'or' or 'majority', but is 'and'"):
        chosen(scored_set(ROWS, {}), {}, 'and')


def test_each_layer_is_judged_by_its_own_group():
    item = scored_set(dict(a=[0.3, 0.6, 0.3, 0.1], b=[0.05, 0.05, 0.2, 0.01]), dict(a=A, b=B))
    assert item.group_names() == ['A', 'B']
    assert chosen(item, dict(A=0.5, B=0.1)) == [0, 3]
    # with either threshold for both layers the outcome differs
    assert chosen(item, dict(A=0.5, B=0.5)) == [0, 2, 3]
    assert chosen(item, dict(A=0.1, B=0.1)) == [3]


def test_layers_in_no_group_keep_all():
    item = scored_set(dict(a=[0.1, 0.1], z=[0., 0.]), dict(a=A))
    assert chosen(item, dict(A=0.5)) == []
    assert chosen(scored_set(dict(z=[0., 0.]), {}), dict(A=0.5)) == []


def test_group_without_threshold_keeps_all():
    assert chosen(scored_set(dict(a=[0., 0.1]), dict(a=A)), dict(A=None)) == []


@pytest.mark.parametrize('share, kept', [(0., [7]), (0.1, [7]), (0.11, [3, 7]), (0.3, [3, 5, 7])])
def test_minimum_share(share, kept):
    row = [0.1, 0.11, 0.12, 0.3, 0.13, 0.2, 0.14, 0.4, 0.15, 0.16]
    removed = chosen(scored_set(dict(a=row), dict(a=A)), dict(A=1.), 'or', share)
    assert sorted(set(range(10)) - set(removed)) == kept


def test_minimum_share_goes_by_the_best_layer():
    item = scored_set(dict(a=[0.1, 0.2, 0.3], b=[0.4, 0.1, 0.1]), dict(a=A, b=A))
    assert chosen(item, dict(A=1.)) == [1, 2]


def test_channels_that_a_layer_does_not_have():
    item = scored_set(dict(a=[0.9, 0.1, NAN, NAN], b=[NAN, NAN, 0.2, 0.8], c=[0.1, 0.1, 0.1, 0.1]),
                      dict(a=A, b=A, c=A))
    assert chosen(item, dict(A=0.5)) == [1, 2]
    # of two layers that have channels 0 and 3 one keeps them: not more than half
    assert chosen(item, dict(A=0.5), 'majority', 0.5) == [1, 2]
    two = scored_set(dict(a=[0.9, 0.1, NAN], b=[NAN, NAN, 0.8]), dict(a=A, b=A))
    assert chosen(two, dict(A=0.5), 'majority') == [1]
    assert item.best_scores.tolist() == pytest.approx([0.9, 0.1, 0.2, 0.8])
    assert sorted(group_scores([two], A).tolist()) == pytest.approx([0.1, 0.8, 0.9])


def test_absent_channels_do_not_count_as_kept_where_there_is_no_threshold():
    item = scored_set(dict(a=[0.1, NAN], b=[0.1, 0.1], c=[0.9, 0.9]), dict(a=A, b=B, c=B))
    assert chosen(item, dict(A=None, B=0.5), 'majority') == [1]


def test_make_plan(tmp_path):
    items = [scored_set(dict(a=[0.9, 0.1]), dict(a=A), 'first'),
             scored_set(dict(b=[0.9, 0.8], a2=[0.1, 0.2]), dict(b=B, a2=A), 'second')]
    plan = make_plan(items, dict(A=0.5, B=0.85))
    assert [(x.name, x.groups, x.layers, x.size, x.removed) for x in plan.sets] == [
        ('first', ['A'], ['a'], 2, [1]), ('second', ['B', 'A'], ['b', 'a2'], 2, [1])]
    assert {name: value.tolist() for name, value in plan.removed().items()} == {
        'first': [1], 'second': [1]}
    plan.save(tmp_path / 'plan.json')
    saved = json.loads((tmp_path / 'plan.json').read_text())
    assert saved['thresholds'] == dict(A=0.5, B=0.85)
    assert saved['sets'][1] == dict(name='second', groups=['B', 'A'], layers=['b', 'a2'], size=2,
                                    removed=[1])


def test_removed_leaves_out_sets_that_stay():
    plan = make_plan([scored_set(dict(a=[0.9]), dict(a=A))], dict(A=0.5))
    assert plan.removed() == {}


def test_score_sets():
    model = randomise(Toy(
        lambda net, x: net.pred(net.raw(net.b(net.a(x)))),
        a=Block(3, 2), b=Block(2, 2), raw=nn.Conv2d(2, 4, 1), pred=nn.Conv2d(4, 1, 1)))
    coupled_sets, skipped = find_coupled_channels(model, (3, 8, 8))
    items = score_sets(model, coupled_sets, BNScale(), [A], skipped)
    assert [item.coupled.name for item in items] == ['a.conv', 'b.conv']
    assert items[0].groups == {'a.bn': A} and items[1].groups == {}
    assert skipped['raw'] == 'BNScale has no scores for it'

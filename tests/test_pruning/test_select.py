# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from layer_kinds import make_kind
from pruning_samples import Block, Toy, randomise

from mmgcp.errors import PruningError
from mmgcp.pruning import BNScale
from mmgcp.pruning.allocate import quantile, thresholds_of_groups
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.options import PruneOptions
from mmgcp.pruning.plan import make_plan
from mmgcp.pruning.scored import ScoredUnit, group_scores, score_units
from mmgcp.pruning.select import Limits, Selection
from mmgcp.pruning.units import ChannelSlice, ChannelUnit, LayerGroup

A = LayerGroup('A', ('a', ))
B = LayerGroup('B', ('b', ))
NAN = float('nan')


def scored_unit(scores, groups, name='set', part=None, **constraints):
    """A unit of layers that have all of its channels, and of one that reads only a part of them.

    The constraints are units or blocks.
    """
    size = len(next(iter(scores.values())))
    slices = tuple(ChannelSlice(layer, 'out', torch.arange(size), torch.arange(size))
                   for layer in scores)
    if part is not None:
        slices += (ChannelSlice('part', 'in', torch.arange(len(part)), torch.tensor(part)), )
    constraints = {key: torch.tensor(value) for key, value in constraints.items()}
    return ScoredUnit(ChannelUnit(name, size, slices, **constraints),
                     {layer: torch.tensor(row, dtype=torch.double)
                      for layer, row in scores.items()}, groups)


def chosen(item, thresholds, merge='or', min_keep_ratio=0.01, round_to=1):
    removed = Selection([item], merge, Limits(min_keep_ratio, round_to)).removed(thresholds)
    assert set(removed) <= {item.unit.name} and all(len(value) for value in removed.values())
    return removed[item.unit.name].tolist() if removed else []


def kept(item, *arguments, **options):
    removed = chosen(item, *arguments, **options)
    assert removed == sorted(set(removed))
    return sorted(set(range(item.unit.size)) - set(removed))


def test_ratio_is_taken_over_all_layers_of_a_group():
    group = LayerGroup('A', ('a', ), ratio=0.4)
    items = [scored_unit(dict(a1=[0.9, 0.1, 0.5]), dict(a1=group)),
             scored_unit(dict(a2=[0.3, 0.7], b1=[0.01, 0.02]), dict(a2=group, b1=B))]
    assert sorted(group_scores(items, group).tolist()) == pytest.approx([.1, .3, .5, .7, .9])
    assert thresholds_of_groups(items, [group, B]) == {'A': pytest.approx(0.3)}


def test_groups_are_told_apart_by_name():
    items = [scored_unit(dict(a=[0.9, 0.1], b=[0.3, 0.2]), dict(a=A, b=B))]
    rated = [replace(A, ratio=0.5), replace(B, ratio=0.5)]
    assert thresholds_of_groups(items, rated) == dict(A=0.1, B=0.2)


@pytest.mark.parametrize('ratio, number', [
    (0., 0), (0.009, 0), (0.01, 1), (0.29, 29), (0.57, 57), (0.58, 58), (0.999, 99)])
def test_ratio_by_hand(ratio, number):
    group = LayerGroup('A', ('a', ), ratio=ratio)
    item = scored_unit(dict(a=[1. + i for i in range(100)][::-1]), dict(a=group))
    thresholds = thresholds_of_groups([item], [group])
    assert thresholds == {'A': float(number) if number else None}
    assert len(chosen(item, thresholds)) == number


@pytest.mark.parametrize('ratio, expected', [
    (-5., None), (-0.3, None), (0., None), (0.24, None), (0.25, 0.1), (0.74, 0.2), (0.75, 0.3),
    (1., 0.4)])
def test_quantile(ratio, expected):
    found = quantile(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.double), ratio)
    assert found == expected


def test_stated_threshold():
    assert thresholds_of_groups([], [LayerGroup('A', ('a', ), threshold=0.25), B]) == {'A': 0.25}


def test_score_at_the_threshold_goes():
    item = scored_unit(dict(a=[0.5, 0.25, 0.75]), dict(a=A))
    assert chosen(item, dict(A=0.5)) == [0, 1]


def test_threshold_is_not_rounded():
    # 1 - 1e-10, 1 and 1 + 1e-10 are one number in single precision
    item = scored_unit(dict(a=[1 - 1e-10, 1., 1 + 1e-10, 1 + 2e-10]), dict(a=A))
    assert [len(chosen(item, dict(A=1 + shift * 1e-10))) for shift in (-2, -1, 0, 1)] == [
        0, 1, 2, 3]


ROWS = dict(a=[0.9, 0.1, 0.9, 0.1], b=[0.9, 0.1, 0.1, 0.9], c=[0.9, 0.1, 0.9, 0.1],
            d=[0.9, 0.9, 0.1, 0.1])


def test_or_keeps_what_any_layer_keeps():
    item = scored_unit(dict(ROWS, d=[0.1, 0.1, 0.1, 0.1]), dict.fromkeys(ROWS, A))
    assert chosen(item, dict(A=0.5), 'or') == [1]


def test_majority_keeps_what_more_than_half_keep():
    # votes: 4, 1, 2 (a tie), 1
    item = scored_unit(ROWS, dict.fromkeys(ROWS, A))
    assert chosen(item, dict(A=0.5), 'majority') == [1, 2, 3]
    three = scored_unit({layer: ROWS[layer] for layer in 'abc'}, dict.fromkeys('abc', A))
    assert chosen(three, dict(A=0.5), 'majority') == [1, 3]


@pytest.mark.parametrize('merge, expected', [
    # means 0.9, 0.3, 0.5, 0.3; sums 3.6, 1.2, 2, 1.2
    ('mean', {0.2: [], 0.4: [1, 3], 0.6: [1, 2, 3]}),
    ('sum', {0.6: [], 1.3: [1, 3], 2.1: [1, 2, 3]})])
def test_mean_and_sum(merge, expected):
    item = scored_unit(ROWS, dict.fromkeys(ROWS, A))
    assert {limit: chosen(item, dict(A=limit), merge) for limit in expected} == expected


@pytest.mark.parametrize('merge, stay', [
    # distances of a from 0.5: -0.2, 0.1, -0.2, -0.4; of b from 0.1: -0.05, -0.05, 0.1, 0.8
    ('or', [1, 2, 3]),
    ('majority', [1]),  # none has both, but one stays: the nearest
    ('mean', [1, 3]),
    # sums 0.35, 0.65, 0.5, 1; the mean threshold is 0.3
    ('sum', [0, 1, 2, 3])])
def test_each_layer_is_judged_by_its_own_group(merge, stay):
    item = scored_unit(dict(a=[0.3, 0.6, 0.3, 0.1], b=[0.05, 0.05, 0.2, 0.9]), dict(a=A, b=B))
    assert item.group_names() == ['A', 'B']
    assert kept(item, dict(A=0.5, B=0.1), merge) == stay


def test_other_thresholds_lead_to_other_channels():
    item = scored_unit(dict(a=[0.3, 0.6, 0.3, 0.1], b=[0.05, 0.05, 0.2, 0.01]), dict(a=A, b=B))
    assert chosen(item, dict(A=0.5, B=0.1)) == [0, 3]
    # with either threshold for both layers the outcome differs
    assert chosen(item, dict(A=0.5, B=0.5)) == [0, 2, 3]
    assert chosen(item, dict(A=0.1, B=0.1)) == [3]
    assert chosen(item, dict(A=0.1, B=0.5)) == [3]


@pytest.mark.parametrize('merge', ['or', 'majority', 'mean', 'sum'])
def test_layers_in_no_group_keep_all(merge):
    item = scored_unit(dict(a=[0.1, 0.1], z=[0., 0.], a2=[0.1, 0.1]), dict(a=A, a2=A))
    assert chosen(item, dict(A=0.5), merge) == []
    assert chosen(scored_unit(dict(z=[0., 0.]), {}), dict(A=0.5), merge) == []


@pytest.mark.parametrize('merge', ['or', 'majority', 'mean', 'sum'])
def test_group_without_threshold_keeps_all(merge):
    assert chosen(scored_unit(dict(a=[0., 0.1]), dict(a=A)), dict(A=None), merge) == []
    assert chosen(scored_unit(dict(a=[0., 0.1]), dict(a=A)), {}, merge) == []


@pytest.mark.parametrize('share, stay', [
    (0., [7]), (0.1, [7]), (0.11, [3, 7]), (0.3, [3, 5, 7]), (1., list(range(10)))])
def test_minimum_share(share, stay):
    row = [0.1, 0.11, 0.12, 0.3, 0.13, 0.2, 0.14, 0.4, 0.15, 0.16]
    assert kept(scored_unit(dict(a=row), dict(a=A)), dict(A=1.), 'or', share) == stay


def test_minimum_share_is_not_rounded_up():
    # 0.07 * 100 is 7.000000000000001
    item = scored_unit(dict(a=[i / 100 for i in range(100)]), dict(a=A))
    assert kept(item, dict(A=2.), min_keep_ratio=0.07) == list(range(93, 100))


def test_minimum_share_goes_by_the_best_layer():
    item = scored_unit(dict(a=[0.1, 0.2, 0.3], b=[0.4, 0.1, 0.1]), dict(a=A, b=A))
    assert chosen(item, dict(A=1.)) == [1, 2]


def test_minimum_share_does_not_bind_what_thresholds_keep():
    item = scored_unit(dict(a=[0.1, 0.2, 0.3, 0.4]), dict(a=A))
    assert kept(item, dict(A=0.15), min_keep_ratio=0.5) == [1, 2, 3]


def test_channels_that_a_layer_does_not_have():
    item = scored_unit(dict(a=[0.9, 0.1, NAN, NAN], b=[NAN, NAN, 0.2, 0.8], c=[0.1, 0.1, 0.1, 0.1]),
                      dict(a=A, b=A, c=A))
    assert chosen(item, dict(A=0.5)) == [1, 2]
    # of two layers that have channels 0 and 3 one keeps them: not more than half
    assert chosen(item, dict(A=0.5), 'majority') == [1, 2, 3]
    item.scores['c'][:] = torch.tensor([0.3, 0.1, 0.15, 0.2], dtype=torch.double)
    fresh = ScoredUnit(item.unit, item.scores, item.groups)
    # the less the second layer is below the threshold, the rather it stays
    assert chosen(fresh, dict(A=0.5), 'majority', 0.5) == [1, 2]
    assert chosen(fresh, dict(A=0.5), 'majority', 0.75) == [1]
    two = scored_unit(dict(a=[0.9, 0.1, NAN], b=[NAN, NAN, 0.8]), dict(a=A, b=A))
    assert chosen(two, dict(A=0.5), 'majority') == [1]
    assert item.best_scores.tolist() == pytest.approx([0.9, 0.1, 0.2, 0.8])
    assert sorted(group_scores([two], A).tolist()) == pytest.approx([0.1, 0.8, 0.9])


def test_absent_channels_do_not_count_as_kept_where_there_is_no_threshold():
    item = scored_unit(dict(a=[0.1, NAN], b=[0.1, 0.1], c=[0.9, 0.9]), dict(a=A, b=B, c=B))
    assert chosen(item, dict(A=None, B=0.5), 'majority') == [1]


@pytest.mark.parametrize('share, stay', [(0., [2, 6]), (0.5, [1, 2, 4, 6]), (0.6, [1, 2, 4, 5, 6])])
def test_no_layer_loses_all_of_the_channels_that_it_has(share, stay):
    """Of seven channels, the layers a and b have three and four, which they cannot do without."""
    def piece(layer, *channels):
        return ChannelSlice(layer, 'out', torch.arange(len(channels)), torch.tensor(channels))

    scores = torch.tensor([0.5, 0.6, 0.7, 0.1, 0.3, 0.2, 0.4], dtype=torch.double)
    unit = ChannelUnit('c', 7, (
        piece('c', *range(7)), piece('a', 0, 1, 2), piece('b', 3, 4, 5, 6)))
    item = ScoredUnit(unit, dict(c=scores), dict(c=A))
    assert kept(item, dict(A=1.), min_keep_ratio=share) == stay
    assert kept(item, dict(A=0.45), min_keep_ratio=0.) == [0, 1, 2, 6]


def test_joined_layers_stay_alive():
    model = make_kind('joined')
    nn.init.constant_(model.b.bn.weight, 0.1)
    model.c.bn.weight.data[4:] = 0.1
    units, _ = find_units(model, (3, 8, 8))
    group = LayerGroup('A', ('[abc]', ), threshold=0.15)
    scored = score_units(model, units, BNScale(), [group], {})
    removed = Selection(scored).removed(dict(A=0.15))['c.conv'].tolist()
    assert len(set(removed) & {4, 5, 6, 7}) == 3


# Units of unequal sizes, as merged groups of GroupNorms have
UNITS = [0, 0, 1, 1, 1, 2, 2, 0]
UNIT_ROW = [0.3, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1, 0.3]


@pytest.mark.parametrize('threshold, options, stay', [
    (0.05, {}, list(range(8))),
    (0.15, {}, [0, 1, 2, 3, 4, 7]),
    (0.25, {}, [0, 1, 7]),
    (1., {}, [0, 1, 7]),  # a whole unit at least
    (1., dict(min_keep_ratio=0.5), [0, 1, 2, 3, 4, 7]),
    (0.25, dict(round_to=2), [0, 1, 2, 3, 4, 7]),
    (0.25, dict(round_to=3), [0, 1, 7]),
    (0.25, dict(round_to=4), list(range(8))),
])
def test_units_go_as_a_whole(threshold, options, stay):
    item = scored_unit(dict(a=UNIT_ROW), dict(a=A), norm_groups=UNITS)
    assert kept(item, dict(A=threshold), **options) == stay


def test_unit_stays_if_one_of_its_channels_does():
    item = scored_unit(dict(a=[0.1, NAN, 0.1, 0.1, 0.1, 0.1], b=[NAN, 0.9, NAN, NAN, 0.8, 0.1]),
                      dict(a=A, b=A), norm_groups=[0, 0, 1, 1, 2, 2])
    assert kept(item, dict(A=0.5)) == [0, 1, 4, 5]


BLOCKS = [0, 0, 0, 0, 1, 1, 1, 1]
BLOCK_ROW = [0.8, 0.7, 0.1, 0.2, 0.3, 0.4, 0.9, 0.35]


@pytest.mark.parametrize('threshold, options, stay', [
    (0.05, {}, list(range(8))),
    (0.5, {}, [0, 1, 5, 6]),  # two of the first block are above, one of the second
    (0.75, {}, [0, 6]),
    (1., {}, [0, 6]),  # one of each block at least
    (1., dict(min_keep_ratio=0.3), [0, 1, 5, 6]),  # three of eight: two of each block
    (1., dict(min_keep_ratio=0.6), [0, 1, 3, 5, 6, 7]),
    (0.75, dict(round_to=2), [0, 6]),
    (0.75, dict(round_to=4), [0, 1, 5, 6]),
    (0.75, dict(round_to=3), [0, 1, 3, 5, 6, 7]),
    (0.5, dict(round_to=8), list(range(8))),
])
def test_equally_many_of_each_block(threshold, options, stay):
    item = scored_unit(dict(a=BLOCK_ROW), dict(a=A), conv_groups=BLOCKS)
    assert kept(item, dict(A=threshold), **options) == stay


def test_blocks_that_alternate_and_free_channels():
    row = [0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.6]
    item = scored_unit(dict(a=row), dict(a=A), conv_groups=[0, 1, 0, 1, -1, -1, -1])
    assert kept(item, dict(A=0.75)) == [0, 1, 2, 3]
    assert kept(item, dict(A=0.85)) == [0, 3]
    assert kept(item, dict(A=0.25)) == [0, 1, 2, 3, 5, 6]


@pytest.mark.parametrize('round_to, above, number', [
    (8, 1, 8), (8, 8, 8), (8, 9, 16), (8, 17, 20), (8, 20, 20), (3, 4, 6), (7, 14, 14),
    (32, 1, 20), (1, 5, 5)])
def test_multiples_of_channels(round_to, above, number):
    """Of 20 channels, so many are above the threshold, and as many as a multiple stay."""
    row = [i / 20 for i in range(20)]
    item = scored_unit(dict(a=row), dict(a=A))
    threshold = row[19 - above] if above < 20 else -1.
    assert kept(item, dict(A=threshold), round_to=round_to) == list(range(20 - number, 20))


def test_minimum_is_rounded_too():
    item = scored_unit(dict(a=[i / 20 for i in range(20)]), dict(a=A))
    assert kept(item, dict(A=1.), min_keep_ratio=0.5, round_to=8) == list(range(4, 20))


@pytest.mark.parametrize('options, message', [
    (dict(merge='and'),
     r"merge must be one of \['majority', 'mean', 'or', 'sum'\], but is 'and'"),
    (dict(min_keep_ratio=-0.1), r'min_keep_ratio must be in \[0, 1\], but is -0.1'),
    (dict(min_keep_ratio=1.01), r'min_keep_ratio must be in \[0, 1\], but is 1.01'),
    (dict(min_keep_ratio=NAN), r'min_keep_ratio must be in \[0, 1\], but is nan'),
    (dict(round_to=0), 'round_to must be a positive integer, but is 0'),
    (dict(round_to=-8), 'round_to must be a positive integer, but is -8'),
])
def test_wrong_options(options, message):
    with pytest.raises(PruningError, match=message):
        PruneOptions(**options)


def test_plan(tmp_path):
    items = [scored_unit(dict(a=[0.9, 0.1]), dict(a=A), 'first'),
             scored_unit(dict(b=[0.9, 0.8], a2=[0.1, 0.2]), dict(b=B, a2=A), 'second'),
             scored_unit(dict(z=[0.1, 0.1], a3=[0.1, 0.1]), dict(a3=A), 'third')]
    thresholds = dict(A=0.5, B=0.85)
    removed = Selection(items).removed(thresholds)
    plan = make_plan([item.unit for item in items], removed, items)
    assert [(x.name, x.layers, x.size, x.removed) for x in plan.units] == [
        ('first', dict(a='A'), 2, [1]), ('second', dict(b='B', a2='A'), 2, [1]),
        ('third', dict(z='', a3='A'), 2, [])]
    for found in (plan.removed(), removed):
        assert {name: value.tolist() for name, value in found.items()} == {
            'first': [1], 'second': [1]}
    plan.save(tmp_path / 'plan.json')
    saved = json.loads((tmp_path / 'plan.json').read_text())
    assert saved['units'][1] == dict(name='second', layers=dict(b='B', a2='A'), size=2,
                                    removed=[1])


def test_plan_names_the_groups_of_layers_without_scores():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x)), a=Block(3, 4),
                          pred=nn.Conv2d(4, 1, 1)))
    units, _ = find_units(model, (3, 8, 8))
    for pattern, groups in (('a', ['A', 'A']), ('a.bn', ['', 'A']), ('a.conv', ['A', ''])):
        group = LayerGroup('A', (pattern, ))
        scored = score_units(model, units, BNScale(), [group], {})
        layers = make_plan(units, {}, scored).units[0].layers
        assert layers == dict(zip(('a.conv', 'a.bn'), groups))
        assert scored[0].group_names() == ([] if pattern == 'a.conv' else ['A'])


def test_score_units():
    model = randomise(Toy(
        lambda net, x: net.pred(net.raw(net.b(net.a(x)))),
        a=Block(3, 2), b=Block(2, 2), raw=nn.Conv2d(2, 4, 1), pred=nn.Conv2d(4, 1, 1)))
    units, skipped = find_units(model, (3, 8, 8))
    items = score_units(model, units, BNScale('keep'), [A], skipped)
    assert [item.unit.name for item in items] == ['a.conv', 'b.conv']
    assert items[0].groups == {'a.conv': A, 'a.bn': A} and items[1].groups == {}
    assert skipped['raw'] == 'BNScale has no scores for it'
    assert items[0].scores['a.bn'].tolist() == pytest.approx(
        model.a.bn.weight.abs().tolist(), rel=2e-6)


def units_of(*sizes, **constraints):
    """Sets of one layer each, named by numbers, and a model that has these layers."""
    units = [scored_unit({str(index): [0.] * size}, {}, str(index), **constraints).unit
            for index, size in enumerate(sizes)]
    return nn.ModuleList(nn.Identity() for _ in sizes), units


def scores_of(units, criterion, model):
    return [next(iter(item.scores.values()))
            for item in score_units(model, units, criterion, [], {})]


@pytest.mark.parametrize('value', [0.25, 1., 300., 0.])
def test_equal_scores_are_told_apart(value):
    model, units = units_of(500, 700)

    def criterion(_, unit):
        return {unit.name: torch.full((unit.size, ), value)}

    first, second = scores_of(units, criterion, model)
    both = torch.cat((first, second))
    assert both.dtype == torch.double and len(both.unique()) == 1200
    # by less than a millionth, and never upwards: what is at a threshold goes
    assert bool((both <= value).all()) and bool((both >= value - 1e-6 * value - 1e-12).all())
    assert not torch.equal(first.argsort(), torch.arange(500))
    assert all(torch.equal(*pair) for pair in zip((first, second),
                                                  scores_of(units, criterion, model)))


def test_row_of_a_set_speaks_for_all_layers():
    """A layer in no group keeps its channels, also if one row stands for all of the layers."""
    model = nn.ModuleDict(dict(a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(3, 8, 1), c=nn.BatchNorm2d(8)))
    every = torch.arange(8)
    unit = ChannelUnit('a', 8, tuple(ChannelSlice(name, 'out', every, every)
                                            for name in ('a', 'b', 'c')))

    def removed(*modules):
        group = LayerGroup('some', modules, threshold=3.5)
        scored = score_units(model, [unit], lambda *_: {'a': every.float()}, [group], {})
        return Selection(scored).removed(dict(some=3.5))

    assert removed('a', 'b')['a'].tolist() == [0, 1, 2, 3]  # a BatchNorm makes no channels
    assert removed('a') == {}


def test_scores_that_differ_keep_their_order():
    model, units = units_of(100)
    row = torch.linspace(0.1, 1, 100)[torch.randperm(100)]
    row[3] = NAN
    found, = scores_of(units, lambda _, unit: {unit.name: row}, model)
    present = [index for index in range(100) if index != 3]
    assert torch.equal(found[present].argsort(), row[present].argsort())
    assert bool(found[3].isnan()) and int(found.isnan().sum()) == 1


def test_channels_of_a_unit_share_their_mean():
    model, units = units_of(6, norm_groups=[0, 1, 0, 1, 1, 2])
    row = torch.tensor([0.1, 0.2, 0.5, NAN, 0.6, 0.6])
    found, = scores_of(units, lambda _, unit: {unit.name: row}, model)
    assert found[[0, 1, 2, 4, 5]].tolist() == pytest.approx([0.3, 0.4, 0.3, 0.4, 0.6], rel=2e-6)
    assert found[0] == found[2] and found[1] == found[4] and bool(found[3].isnan())


@pytest.mark.parametrize('merge', ['or', 'mean', 'majority', 'sum'])
@pytest.mark.parametrize('ratio', [0.25, 0.5, 0.9])
def test_ratio_where_all_scores_are_equal(ratio, merge):
    groups = [LayerGroup('A', ('0', '1'), ratio=ratio), LayerGroup('B', ('2', ), ratio=ratio)]
    model, units = units_of(300, 500, 400)
    scored = score_units(model, units, lambda _, unit: {unit.name: torch.ones(unit.size)},
                        groups, {})
    removed = Selection(scored, merge).removed(thresholds_of_groups(scored, groups))
    assert len(removed['0']) + len(removed['1']) == 800 * ratio
    assert len(removed['2']) == 400 * ratio
    assert abs(len(removed['0']) - 300 * ratio) < 40  # from each layer its share


@pytest.mark.parametrize('merge', ['or', 'mean', 'majority', 'sum'])
def test_channels_that_are_gone(merge):
    """They go on being removed, whatever the layers say, and count for the limits."""
    gone = {'set': torch.tensor([1, 4]), 'unscored': torch.tensor([0])}
    item = scored_unit(dict(a=[.5, 9., .7, .1, NAN, .9]), dict(a=A))

    def removed(threshold, **limits):
        found = Selection([item], merge, Limits(**limits), gone).removed(dict(A=threshold))
        assert found['unscored'].tolist() == [0]
        return found['set'].tolist()

    assert removed(None) == removed(.05) == [1, 4]
    assert removed(.5) == [0, 1, 3, 4]
    assert removed(9.) == [0, 1, 2, 3, 4]
    assert removed(9., min_keep_ratio=.5) == [1, 3, 4]
    assert removed(.3, round_to=2) == [1, 4]


def test_each_part_of_a_unit_is_rounded():
    """A layer reads the first six channels alone."""
    row = [.9, .1, .8, .2, .3, .4, .7, .15, .25, .35, .45, .05]
    item = scored_unit(dict(a=row), dict(a=A), part=[0, 1, 2, 3, 4, 5])
    assert sorted(part.tolist() for part in item.unit.portions) == [
        list(range(6)), list(range(6, 12))]
    # two of the first and one of the others are above: two and two stay
    assert kept(item, dict(A=0.5), round_to=2) == [0, 2, 6, 10]
    assert kept(item, dict(A=0.5)) == [0, 2, 6]
    assert kept(item, dict(A=0.5), round_to=3) == [0, 2, 5, 6, 9, 10]
    assert kept(item, dict(A=0.5), round_to=4) == [0, 2, 4, 5, 6, 8, 9, 10]


def test_free_channels_beside_groups_are_rounded():
    row = [0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.6]
    item = scored_unit(dict(a=row), dict(a=A), part=[0, 1, 2, 3],
                       conv_groups=[0, 1, 0, 1, -1, -1, -1])
    assert kept(item, dict(A=0.5), round_to=2) == [0, 1, 2, 3, 5, 6]


def test_parts_of_whole_groups_are_rounded():
    """Three groups of a GroupNorm, of which another layer has the first two."""
    row = [.3, .3, .2, .2, .9, .9]
    item = scored_unit(dict(a=row), dict(a=A), part=[0, 1, 2, 3],
                       norm_groups=[0, 0, 1, 1, 2, 2])
    assert kept(item, dict(A=0.25), round_to=2) == [0, 1, 4, 5]
    assert kept(item, dict(A=0.25), round_to=4) == [0, 1, 2, 3, 4, 5]

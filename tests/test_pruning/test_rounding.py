# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, randomise

from mmgcp.errors import UnreachableError
from mmgcp.pruning import LayerGroup, prune
from mmgcp.pruning.budget import Budget
from mmgcp.pruning.report import write_report
from mmgcp.pruning.result import LayerRow
from mmgcp.pruning.rounding import give_back, off_multiples, with_default_multiple
from mmgcp.pruning.scored import ScoredUnit
from mmgcp.pruning.select import Limits, Selection
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

SHAPE = (3, 16, 16)


class Count:
    """A channel costs a hundredth, whatever unit it is of."""

    def shares(self, removed):
        share = 1 - sum(map(len, removed.values())) / 100
        return share, share


def item(name, scores, group):
    channels = torch.arange(len(scores))
    unit = ChannelUnit(name, len(scores), (ChannelSlice(name, 'out', channels, channels), ))
    return ScoredUnit(unit, {name: torch.tensor(scores).double()},
                      {name: LayerGroup(group, (name, ))})


def given_back(items, thresholds, flops, fixed=(), round_to=4, gone=None):
    selection = Selection(items, 'or', Limits(0.01, round_to), gone or {})
    removed = selection.removed(thresholds)
    before = {name: channels.tolist() for name, channels in removed.items()}
    found = give_back(selection, thresholds, {name: thresholds[name] for name in fixed}, removed,
                      Count(), Budget(flops=flops))
    assert {name: channels.tolist() for name, channels in removed.items()} == before
    return {name: channels.tolist() for name, channels in found.items()}, before


ITEMS = [item('a', [.1, .2, .3, .4, .5, .6, .7, .8, 2., 2., 2., 2.], 'A'),
         item('b', [1., 2., 3., 4.5, 5., 6., 7., 9., 20., 20., 20., 20.], 'B')]
THRESHOLDS = dict(A=1., B=10.)


@pytest.mark.parametrize('flops, expected', [
    (0.84, dict(a=8, b=8)),  # nothing may come back
    (0.87, dict(a=8, b=8)),  # 3 channels may, but they come back by 4
    (0.88, dict(a=8, b=4)),  # 9 of 10 is nearer to the threshold than 0.8 of 1
    (0.92, dict(a=4, b=4)), (0.96, dict(a=4)), (1., {})])
def test_what_went_last_comes_back_first(flops, expected):
    found, before = given_back(ITEMS, THRESHOLDS, flops)
    assert {name: len(channels) for name, channels in before.items()} == dict(a=8, b=8)
    assert {name: len(channels) for name, channels in found.items()} == expected
    assert all(channels == list(range(len(channels))) for channels in found.values())


def test_a_unit_that_is_too_large_does_not_keep_others_from_coming_back():
    items = [item('a', [.1, .2, 2., 2.], 'A'), item('b', [9.] * 4 + [20.] * 4, 'B')]
    selection = Selection(items, 'or', Limits(0.01, 2))
    removed = selection.removed(THRESHOLDS)

    class Weighted:
        def shares(self, gone):
            share = 1 - 0.1 * len(gone.get('b', ())) - 0.01 * len(gone.get('a', ()))
            return share, share

    found = give_back(selection, THRESHOLDS, {}, removed, Weighted(), Budget(flops=0.6))
    assert {name: len(channels) for name, channels in found.items()} == dict(b=4)


def test_what_no_budget_decides_stays():
    found, before = given_back(ITEMS, THRESHOLDS, 1., fixed=['B'])
    assert found == dict(b=before['b'])


def test_channels_that_are_gone_do_not_come_back():
    found, _ = given_back(ITEMS, THRESHOLDS, 1., gone=dict(b=torch.arange(8)))
    assert found == dict(b=list(range(8)))


def test_narrow_units_stay_whole():
    """One that has no more channels than the multiple is left alone, not torn down."""
    _, before = given_back([item('a', [.1, .2, .3], 'A'), ITEMS[1]], THRESHOLDS, 0.9)
    assert set(before) == {'b'}


def test_layers_off_the_multiple():
    rows = [LayerRow('a', '', 32, 16), LayerRow('b', '', 32, 20), LayerRow('pred', '', 255, 255),
            LayerRow('c', '', 32, 8)]
    assert [row.layer for row in off_multiples(rows, 16)] == ['b', 'c']
    assert [row.layer for row in off_multiples(rows, 8)] == ['b']


@pytest.mark.parametrize('options, multiple', [
    (dict(ratio=0.3), 16), (dict(target_params=0.6), 16), (dict(ratio=0.3, round_to=4), 4)])
def test_report_lists_layers_off_the_multiple(tmp_path, options, multiple):
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 40),
                          b=Block(40, 40), pred=nn.Conv2d(40, 2, 1)))
    result = prune(model, input_shape=SHAPE, criterion=dict(type='mmgcp.BNScale'), **options)
    write_report(result, tmp_path)
    text = (tmp_path / 'report.md').read_text()
    off = [row for row in result.layers if row.after < row.before and row.after % multiple]
    assert bool(off) == (multiple == 16)
    assert all(f'- {row.layer}: {row.after}\n' in text for row in off)
    assert (f'## No multiple of {multiple} channels, which can be slow' in text) == bool(off)


def test_budget_is_nearly_used_up():
    """Units of one width and equal shares step together, and together they step too far."""
    layers = {f'l{number}': Block(3 if number == 0 else 32, 32) for number in range(6)}

    def run(net, x):
        for name in layers:
            x = getattr(net, name)(x)
        return net.pred(x)

    model = randomise(Toy(run, pred=nn.Conv2d(32, 2, 1), **layers))
    result = prune(model, target_params=0.7, round_to=8, allocation='uniform', input_shape=SHAPE,
                   criterion=dict(type='mmgcp.BNScale'), compensate=False)
    assert 0.63 < result.params[1] / result.params[0] <= 0.7
    assert len({row.after for row in result.layers if row.layer != 'pred'}) > 1


@pytest.mark.parametrize('least, expected', [(16, [16]), (8, [16, 8]), (1, [16, 8, 1])])
def test_default_multiple_is_the_largest_that_meets_the_budget(least, expected):
    tried = []

    def run(round_to, target_flops):
        tried.append(round_to)
        assert target_flops == 0.5
        if round_to > least:
            raise UnreachableError('50.0% of the MACs cannot be reached')
        return 'done'

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert with_default_multiple(run, dict(target_flops=0.5)) == 'done'
    assert tried == expected
    assert [str(item.message) for item in caught] == [
        f'50.0% of the MACs cannot be reached with multiples of {multiple} channels: trying '
        'smaller ones' for multiple in expected[:-1]]


def test_a_given_multiple_is_kept():
    def run(round_to):
        raise UnreachableError(f'not with {round_to}')

    with pytest.raises(UnreachableError, match='not with 16'):
        with_default_multiple(run, dict(round_to=16))
    with pytest.raises(UnreachableError, match='not with 1$'), pytest.warns(UserWarning):
        with_default_multiple(run, {})

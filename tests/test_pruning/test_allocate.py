# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from layer_kinds import KINDS, make_kind
from pruning_samples import difference, make_unit, residual_toy, run, two_branches
from zeroing import zero

from mmgcp.errors import PruningError
from mmgcp.pruning import prune
from mmgcp.pruning.allocate import EqualShares, by_position, positions
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.scored import ScoredUnit
from mmgcp.pruning.surgery import gather_channels
from mmgcp.pruning.units import LayerGroup

SHAPE = (3, 16, 20)
ALL = [dict(name='all', modules=['*'])]


def run_prune(model, ratio=0.5, criterion='L1Norm', groups=ALL, **options):
    options = dict(dict(allocation='uniform', input_shape=SHAPE), **options)
    return prune(model, groups, ratio, criterion=dict(type=f'mmgcp.{criterion}'), **options)


def removed_by(result):
    return {item.name: item.removed for item in result.plan.units}


@pytest.mark.parametrize('ratio, left', [
    (0., dict(z=10, a=7, b=4, c=8)), (0.25, dict(z=7, a=5, b=3, c=6)),
    (0.5, dict(z=5, a=3, b=2, c=4)), (0.9, dict(z=1, a=1, b=1, c=1))])
@pytest.mark.parametrize('criterion', ['BNScale', 'L2Norm', 'FPGM', 'Random'])
def test_each_unit_loses_the_ratio(criterion, ratio, left):
    model = two_branches()
    result = run_prune(model, ratio, criterion)
    assert {name: getattr(model, name).conv.out_channels for name in left} == left
    assert result.plan.thresholds == {'all': ratio} and result.scores == {}


@pytest.mark.parametrize('name', 'zabc')
def test_the_lowest_go(name):
    model = two_branches()
    norms = getattr(model, name).conv.weight.detach().abs().sum((1, 2, 3))
    number = len(norms) // 2 + len(norms) % 2  # of seven, the middle one goes, too
    expected = sorted(norms.argsort()[:number].tolist())
    assert removed_by(run_prune(model))[f'{name}.conv'] == expected


def test_layers_of_another_scale_are_treated_alike():
    """One threshold takes all that it may of the layer with small scales."""
    models = [two_branches() for _ in range(2)]
    for model in models:
        model.a.bn.weight.data *= 1e-3
    uniform, everywhere = (run_prune(model, 0.5, 'BNScale', allocation=allocation)
                           for model, allocation in zip(models, ('uniform', 'global')))
    assert len(removed_by(everywhere)['a.conv']) == 6 and len(models[1].a.bn.weight) == 1
    assert {name: len(channels) for name, channels in removed_by(uniform).items()} == {
        'z.conv': 5, 'a.conv': 4, 'b.conv': 2, 'c.conv': 4}


@pytest.mark.parametrize('criterion, default', [
    ('BNScale', 'global'), ('Random', 'global'), ('L1Norm', 'uniform'), ('L2Norm', 'uniform'),
    ('FPGM', 'uniform')])
def test_default(criterion, default):
    plans = {allocation: run_prune(two_branches(), 0.5, criterion, allocation=allocation).plan.units
             for allocation in (None, 'global', 'uniform')}
    assert plans['global'] != plans['uniform'] and plans[None] == plans[default]


@pytest.mark.parametrize('merge, merged', [
    ('or', lambda rows: rows.amax(0)), ('mean', lambda rows: rows.mean(0)),
    ('sum', lambda rows: rows.sum(0)), ('majority', lambda rows: rows.median(0).values)])
def test_coupled_layers_decide_together(merge, merged):
    """They lose the share, whatever the rule: those whose merged scores are lowest."""
    model = residual_toy()
    rows = torch.stack([getattr(model, name).bn.weight.detach().abs()
                        for name in ('stem', 'b1', 'b2')])
    expected = sorted(merged(rows).argsort()[:4].tolist())
    removed = removed_by(run_prune(model, 0.5, 'BNScale', merge=merge))
    (found, ) = [channels for name, channels in removed.items() if len(channels) == 4]
    assert found == expected
    assert model.pred.in_channels == 4 and model.a1.conv.out_channels == 3


def test_shares_of_groups():
    """Each group has its share; layers in none keep their channels."""
    groups = [dict(name='z', modules=['z'], ratio=0.8), dict(name='c', modules=['c'], ratio=0.3)]
    removed = removed_by(run_prune(two_branches(), None, groups=groups))
    assert {name: len(channels) for name, channels in removed.items()} == {
        'z.conv': 8, 'c.conv': 2, 'a.conv': 0, 'b.conv': 0}


@pytest.mark.parametrize('kind', KINDS)
def test_exact_for_all_kinds_of_layers(kind):
    model = make_kind(kind)
    original = copy.deepcopy(model)
    units, _ = find_units(model, SHAPE)
    result = run_prune(model, compensate=False)
    removed = result.plan.removed()
    gone = {key: channels.tolist() for key, channels in gather_channels(units, removed).items()}
    assert removed and difference(run(model), run(zero(original, gone))) < 1e-9
    for unit in units:
        number = len(removed.get(unit.name, ()))
        torn = unit.norm_groups is not None or unit.conv_groups is not None  # or it would be
        assert abs(number - unit.size / 2) <= (2 if torn else 0.5)


def test_budget():
    """A budget finds the share; every unit has about that, none is torn down."""
    result = run_prune(two_branches(), None, 'BNScale', target_params=0.5)
    assert 0.45 < result.params[1] / result.params[0] <= 0.5
    shares = [len(item.removed) / item.size for item in result.plan.units]
    assert max(shares) - min(shares) < 0.2


def test_channels_without_a_score_stay():
    (item, ) = by_position([ScoredUnit(
        make_unit(4), dict(pred=torch.tensor([3., float('nan'), 1., 2.])),
        dict(pred=LayerGroup('all', ('*', ))))], 'or')
    assert item.scores['pred'].isnan().tolist() == [False, True, False, False]
    assert item.scores['pred'].nan_to_num(9).argsort().tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize('options, message', [
    (dict(allocation='local'), "allocation must be one of .*, but is 'local'"),
    (dict(criterion='ThiNet', allocation='global'), "'global', but ThiNet goes layer by layer"),
    (dict(allocation='uniform', ratio=None), 'have neither a ratio nor a threshold')])
def test_request_that_cannot_be_met(options, message):
    with pytest.raises(PruningError, match=message):
        run_prune(two_branches(), **options)


def test_layerwise_criteria_are_uniform():
    plans = [run_prune(two_branches(), criterion='ThiNet', allocation=allocation, batches=[],
                       dry_run=True).plan.units for allocation in (None, 'uniform')]
    assert plans[0] == plans[1] and [len(item.removed) for item in plans[0]] == [4, 2, 4, 5]
    criterion = dict(type='mmgcp.ThiNet', allocation_criterion=dict(type='mmgcp.BNScale'))
    with pytest.raises(PruningError, match="is 'uniform', but ThiNet goes layer by layer"):
        prune(two_branches(), ALL, 0.5, criterion=criterion, allocation='uniform', batches=[],
              input_shape=SHAPE, dry_run=True)
    prune(two_branches(), ALL, 0.5, criterion=criterion, allocation='global', batches=[],
          input_shape=SHAPE, dry_run=True)


def test_equal_shares_of_blocks_and_parts(single):
    conv_groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1])
    for unit in (make_unit(12, conv_groups=conv_groups), make_unit(12, range(4), range(4, 8))):
        scores = positions(unit, EqualShares()(single, unit)['pred'])
        for start in (0, 4, 8):
            assert sorted(scores[start:start + 4].tolist()) == [0.125, 0.375, 0.625, 0.875]


def test_equal_shares_of_units(single):
    norm_groups = torch.tensor([0, 1, 2] * 4)
    unit = make_unit(12, norm_groups=norm_groups)
    scores = positions(unit, EqualShares()(single, unit)['pred'])
    assert [int(12 * scores[norm_groups == group].mean()) for group in range(3)] == [2, 6, 10]


def test_positions_follow_the_scores():
    scores = torch.tensor([5., 1., 3., 2., 9., 8.])
    assert positions(make_unit(6), scores).argsort().tolist() == scores.argsort().tolist()
    # the first three apart from the others
    found = positions(make_unit(6, range(3)), scores)
    assert found.tolist() == pytest.approx([5 / 6, 1 / 6, 1 / 2, 1 / 6, 5 / 6, 1 / 2])

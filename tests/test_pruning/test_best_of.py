# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The best of several criteria, with each of them alone as the oracle."""
import copy
import json

import pytest
from block_toys import SHAPE, block_net, make_batches
from loss_toys import assert_as_before, snapshot

from mmgcp.errors import PruningError, UnreachableError
from mmgcp.pruning import BestOf, prune
from mmgcp.pruning.blocks.scores import mean_loss
from mmgcp.pruning.report import summarize
from mmgcp.registry import TASK_UTILS

CRITERIA = [dict(type='mmgcp.L1Norm'), dict(type='mmgcp.Random', seed=1), dict(type='mmgcp.OBS')]
BEST = dict(type='mmgcp.BestOf', criteria=CRITERIA)


def silent(*_):
    pass


def settings(**options):
    batches = make_batches()
    return dict(dict(target_flops=0.5, round_to=2, allocation='uniform', batches=batches,
                     input_shape=SHAPE, calibration=[batch.images for batch in batches]),
                **options)


@pytest.mark.parametrize('options, tolerance', [
    (dict(), 1e-4), (dict(compensate=False), 1e-4), (dict(compensate='adapt-norms'), 1e-4),
    (dict(remove_blocks=1), 1e-3)])  # without which the block is made up for twice
def test_each_alone(options, tolerance):
    alone = []
    for criterion in CRITERIA:
        model = block_net()
        plan = prune(model, criterion=criterion, **settings(**options)).plan
        alone.append((mean_loss(model, make_batches(), silent), plan))
    assert len({loss for loss, _ in alone}) == 3
    model = block_net()
    result = prune(model, criterion=BEST, **settings(**options))
    tried = result.plan.options['tried']
    assert [item['criterion'] for item in tried] == CRITERIA
    assert [item['loss'] for item in tried] == pytest.approx([loss for loss, _ in alone],
                                                          rel=tolerance)
    loss, plan = min(alone, key=lambda pair: pair[0])
    assert [unit.removed for unit in result.plan.units] == [unit.removed for unit in plan.units]
    assert result.plan.options['criterion'] == plan.options['criterion']
    assert mean_loss(model, make_batches(), silent) == pytest.approx(loss, rel=1e-4)
    assert f'(loss without training: L1Norm {tried[0]["loss"]:.3f}, Random ' in summarize(result)


def test_nothing_is_changed_by_trying():
    model = block_net()
    before = snapshot(model)
    prune(model, criterion=BEST, dry_run=True, **settings())
    assert_as_before(model, before)


def test_in_steps():
    """What is left after the last one is what was measured for it."""
    model, trained = block_net(), []
    result = prune(model, criterion=BEST, steps=2, finetune=lambda *_: trained.append(1),
                   **settings())
    losses = [item['loss'] for item in result.plan.options['tried']]
    assert len(trained) == 1 and len(losses) == 3
    assert mean_loss(model, make_batches(), silent) == pytest.approx(min(losses), rel=1e-4)


def test_a_criterion_that_cannot_meet_the_request(monkeypatch):
    """It is left out; if none can, the first one says why."""
    def fail(self, *_):
        raise PruningError(f'not by {type(self).__name__}')

    monkeypatch.setattr('mmgcp.pruning.scores.L1Norm.prepare', fail)
    with pytest.warns(UserWarning, match='BestOf leaves out a criterion: not by L1Norm'):
        tried = prune(block_net(), criterion=BEST, **settings()).plan.options['tried']
    assert [item['criterion'] for item in tried] == CRITERIA[1:]
    for name in ('Random', 'OBS'):
        monkeypatch.setattr(f'mmgcp.pruning.scores.{name}.prepare', fail, raising=False)
    model = block_net()
    before = snapshot(model)
    with pytest.raises(PruningError, match='not by L1Norm'):
        prune(model, criterion=BEST, **settings())
    assert_as_before(model, before)


def test_a_loss_that_is_not_finite(monkeypatch):
    """Of one criterion, which is left out."""
    losses = []

    def measured(model, batches, progress):
        losses.append(mean_loss(model, batches, progress))
        if len(losses) == 1:
            raise PruningError('the loss is nan')
        return losses[-1]

    monkeypatch.setattr('mmgcp.pruning.best_of.mean_loss', measured)
    with pytest.warns(UserWarning, match='the loss is nan'):
        plan = prune(block_net(), criterion=BEST, **settings()).plan
    assert [item['criterion'] for item in plan.options['tried']] == CRITERIA[1:]


def test_other_multiples_if_a_budget_fails(monkeypatch):
    """Where all fail, the error is the one that callers try other multiples for."""
    def fail(self, *_):
        raise UnreachableError('too much') if type(self).__name__ == 'OBS' else PruningError('no')

    for name in ('L1Norm', 'Random', 'OBS'):
        monkeypatch.setattr(f'mmgcp.pruning.scores.{name}.prepare', fail)
    with pytest.raises(UnreachableError):
        prune(block_net(), criterion=BEST, **settings())


@pytest.mark.parametrize('options', [dict(ratio=0.5), dict(groups=[
    dict(name='all', modules=['*'], threshold=0.2)])])
def test_no_budget(options):
    """What ratios and thresholds take depends on the criterion."""
    with pytest.raises(PruningError, match='BestOf needs a budget: target_params, target_flops'):
        prune(block_net(), criterion=BEST, **settings(target_flops=None, **options))


def test_shares_and_names():
    """A plan has what each would leave, and can be saved where configs have classes."""
    criteria = [dict(item, type=type(TASK_UTILS.build(item))) for item in CRITERIA]
    model = block_net()
    result = prune(model, criterion=dict(type=BestOf, criteria=criteria), **settings())
    tried = json.loads(json.dumps(result.plan.options))['tried']
    assert [item['criterion'] for item in tried] == CRITERIA
    best = min(tried, key=lambda item: item['loss'])
    assert best['shares'] == pytest.approx([result.params[1] / result.params[0],
                                            result.macs[1] / result.macs[0]])


@pytest.mark.parametrize('tried', [None, 3, [{}], [dict(loss=None), dict(loss='a')]])
def test_edited_plan(tried):
    plan = prune(block_net(), criterion=BEST, **settings()).plan
    plan.options.update(tried=tried, criterion='OBS')
    printed = summarize(prune(block_net(), plan=plan, input_shape=SHAPE))
    assert 'chosen' not in printed and 'without training' not in printed


def test_training_in_between():
    with pytest.raises(PruningError, match='but mmgcp.BestOf is none, or for several steps'):
        prune(block_net(), criterion=BEST, finetune=silent, **settings())


def test_default_allocations(monkeypatch):
    """Each criterion has its own, unless the user says so."""
    monkeypatch.setattr('mmgcp.pruning.strategy.average_precision', lambda *_: 0.5)
    criterion = dict(BEST, criteria=[dict(type='mmgcp.OBS')])
    plan = prune(block_net(), criterion=criterion, **settings(allocation=None)).plan
    assert plan.options['allocation'] == 'measured' and len(plan.options['tried']) == 1


@pytest.mark.parametrize('criteria, message', [
    ([], 'criteria must be a list of configs with a type'),
    ([dict(kind='OBS')], 'criteria must be a list of configs with a type'),
    ([dict(type='mmgcp.ThiNet')], 'BestOf cannot try ThiNet'),
    ([BEST], 'BestOf cannot try BestOf'),
    ([dict(type='mmgcp.OBS', ridge=-1)], 'ridge'),
])
def test_wrong_criteria(criteria, message):
    with pytest.raises(PruningError, match=message):
        prune(block_net(), criterion=dict(type='mmgcp.BestOf', criteria=criteria), **settings())


def test_no_training_data():
    with pytest.raises(PruningError, match='the criterion BestOf needs training data'):
        prune(block_net(), criterion=BEST, **settings(batches=None, calibration=None))


def test_not_for_shares_of_others():
    criterion = dict(type='mmgcp.ThiNet', allocation_criterion=copy.deepcopy(BEST))
    with pytest.raises(PruningError, match='it cannot be the allocation_criterion'):
        prune(block_net(), criterion=criterion, **settings(allocation=None))


def test_reasons_of_others():
    class Whole(type(BestOf().built()[0])):
        not_without_blocks = 'it needs them'

    criterion = BestOf()
    criterion.built = lambda: [*BestOf().built(), Whole()]
    assert criterion.not_in_steps is None and criterion.not_without_blocks == 'it needs them'

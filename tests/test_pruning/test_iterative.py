# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning in several steps, with training in between."""
import copy

import pytest
import torch
import torch.nn as nn
from layer_kinds import KINDS, make_kind
from loss_toys import LossToy, make_batches
from pruning_samples import GROUPS as YOLOV4_GROUPS
from pruning_samples import Block, difference, randomise, run, two_branches

from mmgcp.analysis import count_complexity
from mmgcp.errors import PruningError, UserError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import LayerGroup, PruningPlan, count_channels, prune
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.plan import validate_plan
from mmgcp.pruning.scores import Taylor
from mmgcp.pruning.surgery import remove_channels

SHAPE = (3, 16, 20)
ALL = [dict(name='all', modules=['*'])]
GROUPS = [dict(name='first', modules=['a']), dict(name='coupled', modules=['b', 'd']),
          dict(name='inner', modules=['c'])]


class Training:
    """Changes all weights a little, and remembers when it was called and what it got."""
    settings = dict(epochs=1)

    def __init__(self, amount=0.02, shape=SHAPE, fails=None):
        self.amount, self.shape, self.fails = amount, shape, fails
        self.numbers, self.shares = [], []

    @torch.no_grad()
    def __call__(self, model, number):
        if number == self.fails:
            raise KeyboardInterrupt
        self.numbers.append(number)
        self.shares.append(count_complexity(model, self.shape))
        model.train()
        generator = torch.Generator().manual_seed(number)
        for param in model.parameters():
            param.mul_(1 + self.amount * torch.randn(param.shape, generator=generator))


@pytest.fixture
def model():
    """A shortcut, with enough channels for budgets to be met."""
    def run(net, x):
        x = net.b(net.a(x))
        return net.pred(x + net.d(net.c(x)))

    torch.manual_seed(0)
    return randomise(LossToy(run, a=Block(3, 64), b=Block(64, 128, 3, stride=2), c=Block(128, 160),
                             d=Block(160, 128), pred=nn.Conv2d(128, 2, 1)))


@pytest.fixture
def batches():
    return [Batch(images.float(), data) for images, data in make_batches(4, 4, shape=SHAPE)]


def state_of(model):
    return ({name: (value, value.clone()) for name, value in
             (*model.named_parameters(), *model.named_buffers())},
            [module.training for module in model.modules()],
            [param.requires_grad for param in model.parameters()])


def assert_untouched(model, state):
    values, modes, flags = state_of(model)
    assert values.keys() == state[0].keys() and (modes, flags) == state[1:]
    for name, (tensor, value) in values.items():
        assert tensor is state[0][name][0] and torch.equal(value, state[0][name][1]), name


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def numbers_of(plan):
    return {item.name: len(item.removed) for item in plan.units}


@pytest.mark.parametrize('options, slack', [
    (dict(target_params=0.4), 0.01), (dict(target_flops=0.5), 0.01),
    (dict(target_params=0.45, target_flops=0.45), 0.01),
    (dict(target_params=0.4, allocation='uniform'), 0.01),
    (dict(target_params=0.4, round_to=4), 0.1)])
def test_budget_is_met_in_equal_shares(options, slack, model):
    """Each step keeps the same share of what it finds; the last is as exact as a single one."""
    training = Training()
    before = count_complexity(model, SHAPE)
    result = prune(model, GROUPS, steps=3, finetune=training, input_shape=SHAPE, **options)
    assert training.numbers == [1, 2]  # not after the last step
    assert [result.params[0], result.macs[0]] == list(before)
    assert [result.params[1], result.macs[1]] == list(count_complexity(model, SHAPE))
    steps = [*training.shares, (result.params[1], result.macs[1])]
    for index, name in enumerate(('target_params', 'target_flops')):
        for number, counts in enumerate(steps, 1):
            if name in options:
                share, target = counts[index] / before[index], options[name]**(number / 3)
                assert share == pytest.approx(target, rel=slack)
                assert 'round_to' not in options or share <= target


def test_last_step_that_ends_beside_the_budget(model):
    """There is a warning, where a single step is refused: nothing that was trained is lost."""
    options = dict(target_params=0.5, target_flops=0.5, input_shape=SHAPE)
    with pytest.warns(UserWarning, match='49.3% of the MACs are left instead of 50.0%') as warned:
        result = prune(model, GROUPS, steps=3, finetune=Training(), **options)
    assert len([item for item in warned if 'are left instead' in str(item.message)]) == 1
    assert [round(result.params[1] / result.params[0], 3),
            round(result.macs[1] / result.macs[0], 3)] == [0.495, 0.493]


def test_detector(original):
    model, units, _ = original
    model, training = copy.deepcopy(model), Training(shape=(3, 64, 96))
    result = prune(model, YOLOV4_GROUPS, target_params=0.4, steps=2, finetune=training,
                   input_shape=(3, 64, 96))
    assert training.shares[0][0] == pytest.approx(0.4**0.5 * result.params[0], rel=0.01)
    assert result.params[1] == pytest.approx(0.4 * result.params[0], rel=0.01)
    assert result.params[1] == sum(param.numel() for param in model.parameters())
    validate_plan(result.plan, units)


@pytest.mark.parametrize('merge, allocation, amount', [
    ('or', 'global', dict(ratio=0.6)), ('or', 'uniform', dict(ratio=0.6)),
    ('or', 'global', dict(ratio=0.8, min_keep_ratio=0.5)),
    ('or', 'global', dict(target_params=0.4)), ('mean', 'global', dict(target_params=0.4)),
    ('majority', 'global', dict(target_params=0.4)), ('sum', 'uniform', dict(target_params=0.4)),
    ('mean', 'global', dict(target_flops=0.5, round_to=4))])
def test_without_training_it_is_as_one_step(merge, allocation, amount, model):
    """Scores of BatchNorms do not change then, so that several steps lead where one does."""
    other = copy.deepcopy(model)
    options = dict(merge=merge, allocation=allocation, compensate=False, input_shape=SHAPE,
                   **amount)
    one = prune(model, GROUPS, **options)
    four = prune(other, GROUPS, steps=4, **options)
    assert four.plan.units == one.plan.units
    assert (four.params, four.macs, four.channels_before, four.channels_after) == (
        one.params, one.macs, one.channels_before, one.channels_after)
    assert_same_weights(model, other)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('compensate', [True, False])
def test_kinds_of_layers(kind, compensate):
    """All channels in the end are right; whole groups and equally many of each are removed."""
    model = make_kind(kind)
    dense = copy.deepcopy(model)
    result = prune(model, ALL, 0.7, steps=3, merge='mean', input_shape=SHAPE,
                   compensate=compensate, finetune=Training())
    units, _ = find_units(dense, SHAPE)
    validate_plan(result.plan, units)
    remove_channels(dense, units, result.plan.removed())
    assert repr(dense) == repr(model) and result.changed_channels
    assert result.channels_after == count_channels(model)
    assert (result.params[1], result.macs[1]) == count_complexity(model, SHAPE)


@pytest.mark.parametrize('compensate', [True, False])
def test_plan_is_one_for_the_original(model, tmp_path, compensate):
    """Applied to it, it leads to the same structure; and to other weights, without training."""
    dense, other = copy.deepcopy(model), copy.deepcopy(model)
    result = prune(model, GROUPS, target_params=0.4, steps=3, finetune=Training(),
                   compensate=compensate, input_shape=SHAPE)
    result.plan.save(tmp_path / 'plan.json')
    assert PruningPlan.load(tmp_path / 'plan.json') == result.plan
    applied = prune(dense, plan=tmp_path / 'plan.json', compensate=compensate, input_shape=SHAPE)
    assert applied.channels_before == result.channels_before
    assert applied.channels_after == result.channels_after == count_channels(model)
    assert (applied.params, applied.macs) == (result.params, result.macs)
    assert {name: value.shape for name, value in dense.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()}
    assert difference(run(model), run(dense)) > 1e-3
    with pytest.raises(PruningError, match=r'is for \d+ channels, but the model has'):
        prune(model, plan=result.plan, input_shape=SHAPE)
    # steps do not count where there is a plan
    again = prune(other, plan=result.plan, steps=3, finetune=Training(), input_shape=SHAPE,
                  compensate=compensate)
    assert again.plan == result.plan
    assert_same_weights(other, dense)


def test_weights_that_are_left_are_the_originals():
    """Without compensation and with training that adds a number for each channel."""
    model = make_kind('plain')
    model.a.bn.bias.data = torch.tensor([.1, .2, .3, .4, .5, .6, .7, .8])
    dense = copy.deepcopy(model)
    result = prune(model, [dict(name='a', modules=['a'])], 0.75, steps=3, compensate=False,
                   input_shape=SHAPE)
    removed = result.plan.removed()
    assert set(removed) == {'a.conv'} and len(removed['a.conv']) == 6
    kept = sorted(set(range(8)) - set(removed['a.conv'].tolist()))
    assert torch.equal(model.a.conv.weight, dense.a.conv.weight[kept])
    assert torch.equal(model.a.bn.bias, dense.a.bn.bias[kept])
    assert torch.equal(model.b.conv.weight, dense.b.conv.weight[:, kept])
    # the lowest scale factors of all 8 channels are gone
    assert sorted(dense.a.bn.weight.abs().argsort()[:6].tolist()) == removed['a.conv'].tolist()


def test_training_decides_what_goes_next():
    """A channel whose score training has raised stays, and one that it has lowered goes."""
    model = make_kind('plain')
    model.a.bn.weight.data = torch.tensor([.1, .2, .3, .4, .5, .6, .7, .8])
    seen = []

    @torch.no_grad()
    def training(model, number):
        seen.append((number, model.a.bn.weight.tolist()))
        model.a.bn.weight[0] = 2.  # channel 2 of the original
        model.a.bn.weight[-1] = 0.01  # channel 7

    result = prune(model, [dict(name='a', modules=['a'])], 0.5, steps=2, finetune=training,
                   compensate=False, input_shape=SHAPE)
    assert seen == [(1, pytest.approx([.3, .4, .5, .6, .7, .8]))]
    assert result.plan.removed()['a.conv'].tolist() == [0, 1, 3, 7]
    assert model.a.bn.weight.tolist() == pytest.approx([2., .5, .6, .7])
    # thresholds and scores of the report are those of the last step
    assert sorted(result.scores['a'].tolist()) == pytest.approx([.01, .4, .5, .6, .7, 2.], rel=1e-4)
    assert .4 <= result.plan.thresholds['a'] + 1e-5 < .5


def test_least_share_is_that_of_the_original():
    """It does not shrink from step to step."""
    model = two_branches()
    result = prune(model, ALL, 0.9, steps=4, min_keep_ratio=0.4, finetune=Training(),
                   input_shape=SHAPE)
    left = {item.name: item.size - len(item.removed) for item in result.plan.units}
    assert left['z.conv'] >= 4 and left['a.conv'] >= 3 and left['b.conv'] >= 2
    assert left['c.conv'] >= 4 and sum(left.values()) <= 15


def test_groups_of_their_own(model):
    """Ratios of groups grow from step to step, thresholds hold in all of them."""
    other = copy.deepcopy(model)
    groups = [dict(GROUPS[0], threshold=0.3), LayerGroup(**GROUPS[1], ratio=0.64), GROUPS[2]]
    training = Training(0.)
    options = dict(target_params=0.5, compensate=False, input_shape=SHAPE)
    one = prune(other, groups, **options)
    result = prune(model, groups, steps=2, finetune=training, **options)
    assert result.plan.units == one.plan.units
    assert groups[1].ratio == 0.64 and groups[0]['threshold'] == 0.3  # have not been changed
    assert training.shares[0][0] == pytest.approx(0.5**0.5 * result.params[0], rel=0.01)


@pytest.mark.parametrize('name, needs', [('Taylor', True), ('GroupFisher', True), ('APoZ', True),
                                         ('L1Norm', False), ('FPGM', False), ('Random', False)])
def test_criteria_with_and_without_data(name, needs, model, batches):
    training, dense = Training(), copy.deepcopy(model)
    options = dict(criterion=dict(type=f'mmgcp.{name}'), steps=3, target_params=0.5,
                   finetune=training, input_shape=SHAPE, calibration=[batches[0].images])
    if needs:
        with pytest.raises(PruningError, match=f'{name} needs training data'):
            prune(model, GROUPS, **options)
        assert training.numbers == []
    result = prune(model, GROUPS, batches=batches, **options)
    assert training.numbers == [1, 2]
    assert result.params[1] == pytest.approx(0.5 * result.params[0], rel=0.01)
    assert result.channels_after == count_channels(model)
    validate_plan(result.plan, find_units(dense, SHAPE)[0])


def test_scores_are_taken_of_the_smaller_model(model, batches, monkeypatch):
    """In each step by a criterion of its own, on all that is left."""
    sizes, built, prepare = [], [], Taylor.prepare

    def spying(self, model, units, batches, progress):
        sizes.append({unit.name: unit.size for unit in units})
        built.append(self)
        prepare(self, model, units, batches, progress)

    monkeypatch.setattr(Taylor, 'prepare', spying)
    result = prune(model, GROUPS, 0.6, steps=3, criterion=dict(type='mmgcp.Taylor'), merge='mean',
                   batches=batches, input_shape=SHAPE)
    sizes.append({item.name: item.size - len(item.removed) for item in result.plan.units})
    # the first time it is found out whether the request can be met
    assert sizes[0] == sizes[1] == {'a.conv': 64, 'b.conv': 128, 'c.conv': 160}
    # 0.4**(1 / 3) of the channels are kept three times
    for number, kept in ((2, 0.737), (3, 0.543), (4, 0.4)):
        assert sizes[number] == {name: pytest.approx(kept * size, abs=1)
                                 for name, size in sizes[0].items()}
    assert len({id(item) for item in built}) == 4


def test_options_of_the_plan(model):
    other, third = copy.deepcopy(model), copy.deepcopy(model)
    options = dict(target_params=0.6, input_shape=SHAPE)
    result = prune(model, GROUPS, steps=2, finetune=Training(), **options)
    assert result.plan.options == dict(
        prune(other, GROUPS, **options).plan.options, steps=2, finetune=dict(epochs=1))
    result = prune(third, GROUPS, ratio=0.3, steps=2, input_shape=SHAPE)
    assert result.plan.options['finetune'] is None and result.plan.options['ratio'] == 0.3


def test_metric_is_measured_in_each_step(model):
    calls = []

    def metric(net):
        calls.append(net)
        return 1. - 0.01 * len(calls)

    result = prune(model, GROUPS[:2], target_params=0.8, steps=2, evaluate=metric,
                   input_shape=SHAPE)
    assert len(calls) == 2 * (1 + 2 * 2)
    assert result.plan.options['sensitivity']['baseline'] == pytest.approx(1. - 0.06)


def test_modes_and_frozen_parts_stay(model):
    model.train()
    model.b.eval()
    model.a.conv.weight.requires_grad_(False)

    def training(model, number):
        model.train().requires_grad_(True)
        model(torch.rand(2, *SHAPE)).sum().backward()

    prune(model, GROUPS, target_params=0.5, steps=3, finetune=training, input_shape=SHAPE)
    assert model.training and model.a.bn.training and not model.b.bn.training
    assert [name for name, param in model.named_parameters() if not param.requires_grad] == [
        'a.conv.weight']
    assert all(param.grad is None for param in model.parameters())


def test_dry_run_is_that_of_one_step(model):
    state, training = state_of(model), Training()
    options = dict(target_params=0.5, input_shape=SHAPE, dry_run=True)
    one = prune(model, GROUPS, **options)
    dry = prune(model, GROUPS, steps=3, finetune=training, **options)
    assert_untouched(model, state)
    assert training.numbers == []
    assert (dry.plan.units, dry.params, dry.macs) == (one.plan.units, one.params, one.macs)


@pytest.mark.parametrize('when', ['first training', 'second training', 'second decision',
                                  'first removal', 'second removal', 'last removal', 'file'])
def test_interruption_restores_the_original(when, model, monkeypatch, tmp_path):
    state, file = state_of(model), tmp_path / 'new' / 'unfinished.pth'
    training = Training(fails={'first training': 1, 'second training': 2}.get(when))
    place = {'first removal': ('removing channels', 1), 'second removal': ('removing channels', 2),
             'last removal': ('removing channels', 3), 'second decision': ('choosing channels', 3)}
    seen = []

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def progress(stage, done, steps):
        if stage == place.get(when, [None])[0] and done == 1:
            seen.append(stage)
            if len(seen) == place[when][1]:
                raise KeyboardInterrupt

    if when == 'file':
        monkeypatch.setattr('mmgcp.pruning.resume.torch.save', interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(model, GROUPS, target_params=0.4, steps=3, finetune=training, input_shape=SHAPE,
              checkpoint_file=file, progress=progress)
    assert_untouched(model, state)
    assert file.exists() == (when not in ('first training', 'first removal', 'file'))


@pytest.mark.parametrize('criterion, done', [
    ('BNScale', 0), ('BNScale', 3), ('L1Norm', 1), ('Taylor', 2)])
def test_resumed_is_as_uninterrupted(criterion, done, model, batches, tmp_path):
    """And no finished step is repeated."""
    expected, original, steps = copy.deepcopy(model), copy.deepcopy(model), []
    options = dict(groups=GROUPS, target_params=0.4, steps=5, input_shape=SHAPE, batches=batches,
                   calibration=[batches[0].images], criterion=dict(type=f'mmgcp.{criterion}'))
    first = prune(expected, finetune=Training(), **options)
    file = tmp_path / 'unfinished.pth'
    with pytest.raises(KeyboardInterrupt):
        prune(model, finetune=Training(fails=done + 1), checkpoint_file=file, **options)
    assert file.exists() == (done > 0)
    training = Training()
    second = prune(model, finetune=training, checkpoint_file=file,
                   progress=lambda *step: steps.append(step), **options)
    assert training.numbers == [1, 2, 3, 4][done:]
    assert [step for step in steps if step[0] == 'resuming steps'] == (
        [('resuming steps', done, 5)] if done else [])
    assert first.plan == second.plan and first.uncompensated == second.uncompensated
    assert (first.params, first.macs, first.channels_before, first.channels_after) == (
        second.params, second.macs, second.channels_before, second.channels_after)
    assert_same_weights(expected, model)
    training = Training()
    prune(original, finetune=training, checkpoint_file=file, **options)  # the last step is left
    assert training.numbers == []
    assert_same_weights(expected, original)


class Following(Training):
    """The same as the option ``recover``, which gets the original, too."""
    settings = dict(steps=2)

    def __call__(self, model, original, removed):
        super().__call__(model, len(self.numbers) + 1)
        self.originals = [*getattr(self, 'originals', []), copy.deepcopy(original)]
        layer = model.c.conv
        assert layer.out_channels == original.c.conv.out_channels - len(removed['c.conv', 'out'])
        return dict(call=len(self.numbers))


def test_recovery_after_each_step(model, tmp_path):
    """With the original each time; a run that was interrupted goes on."""
    dense, other, file = copy.deepcopy(model), copy.deepcopy(model), tmp_path / 'unfinished.pth'
    options = dict(groups=GROUPS, target_params=0.4, steps=3, input_shape=SHAPE)
    recover = Following()
    result = prune(model, recover=recover, **options)
    assert recover.numbers == [1, 2, 3] and result.recovery == dict(call=3)
    for original in recover.originals:
        assert_same_weights(original, dense)
    params = [params for params, _ in recover.shares]
    assert params == sorted(params, reverse=True) and params[0] > params[1] > params[2]
    with pytest.raises(KeyboardInterrupt):
        prune(other, recover=Following(fails=2), checkpoint_file=file, **options)
    assert_same_weights(other, dense)
    again = Following()
    again.numbers.append(1)  # which is not repeated
    assert prune(other, recover=again, checkpoint_file=file, **options).plan == result.plan
    assert again.numbers == [1, 2, 3]
    assert_same_weights(other, model)


def test_recovery_after_a_training_in_between(model):
    recover, training = Following(), Training()
    prune(model, GROUPS, target_params=0.4, steps=3, input_shape=SHAPE, recover=recover,
          finetune=training)
    assert training.numbers == [1, 2] and recover.numbers == [1]


@pytest.mark.parametrize('change', ['target', 'steps', 'groups', 'weights', 'criterion',
                                    'finetune', 'nothing'])
def test_another_request_begins_anew(change, model, tmp_path):
    file, training = tmp_path / 'unfinished.pth', Training(fails=2)
    options = dict(groups=GROUPS, target_params=0.5, steps=3, input_shape=SHAPE,
                   finetune=training, checkpoint_file=file)
    with pytest.raises(KeyboardInterrupt):
        prune(model, **options)
    other = Training()
    other.settings = dict(epochs=1 + (change == 'finetune'))
    options.update(finetune=other, **dict(
        target=dict(target_params=0.6), steps=dict(steps=4), groups=dict(groups=GROUPS[:2]),
        criterion=dict(criterion=dict(type='mmgcp.L2Norm'))).get(change, {}))
    if change == 'weights':
        model.a.conv.weight.data[0, 0, 0, 0] += 1e-3
    prune(model, **options)
    assert other.numbers == ([2] if change == 'nothing' else list(range(1, options['steps'])))


def test_step_beyond_the_request_is_left_out(monkeypatch):
    """Where a step can only be taken as a whole, it is not taken too early."""
    model = make_kind('plain')
    model.a.bn.weight.data = torch.tensor([.1, .1, .1, .1, 1., 1.1, 1.2, 1.3])
    monkeypatch.setattr('mmgcp.pruning.scored._without_ties', lambda scores, *_: scores)
    training = Training(0.)
    groups = [dict(name='a', modules=['a'])]
    options = dict(target_flops=0.5, round_to=4, compensate=False, input_shape=SHAPE)
    dense = copy.deepcopy(model)
    result = prune(model, groups, steps=8, finetune=training, **options)
    assert numbers_of(result.plan)['a.conv'] == 4
    assert result.plan.units == prune(dense, groups, **options).plan.units
    # it is not trained where nothing has been removed
    assert len(training.numbers) <= 1 and set(training.shares) <= {
        (result.params[1], result.macs[1])}


def test_diverged_training(model):
    state = state_of(model)
    with pytest.raises(PruningError, match='the training after step 2 has diverged.*learning rate'):
        prune(model, GROUPS, target_params=0.4, steps=3, input_shape=SHAPE,
              finetune=lambda model, number: number == 2 and
              model.a.bn.weight.data.mul_(float('nan')))
    assert_untouched(model, state)


def test_broken_surgery_is_noticed_in_each_step(model, monkeypatch):
    state, calls = state_of(model), []

    def keep(model, units, removed):
        calls.append(removed)
        remove_channels(model, units, removed)
        if len(calls) == 2:
            model.b.conv.weight.data.mul_(2.)

    monkeypatch.setattr('mmgcp.pruning.surgery.remove_channels', keep)
    with pytest.raises(PruningError, match='does not compute what the original does'):
        prune(model, GROUPS, target_params=0.4, steps=3, input_shape=SHAPE, finetune=Training())
    assert_untouched(model, state)


@pytest.mark.parametrize('options, message', [
    (dict(steps=0), 'steps must be an integer from 1 to 1000, but is 0'),
    (dict(steps=2.5), 'steps must be .* but is 2.5'),
    (dict(steps=True), 'steps must be .* but is True'),
    (dict(finetune=dict(epochs=1)), 'finetune must be a function, but is'),
    (dict(criterion=dict(type='mmgcp.ThiNet')),
     'ThiNet cannot prune in 3 steps: it goes layer by layer, and prune_cfg.finetune trains'),
    (dict(criterion=dict(type='mmgcp.LCP'), dry_run=True), 'LCP cannot prune in 3 steps'),
    (dict(criterion=dict(type='mmgcp.CPSCA')),
     'CPSCA cannot prune in 3 steps: the attention that it looks at is gone after the first one'),
    (dict(steps=1, finetune=Training()),
     'finetune is for layer-wise criteria, but mmgcp.BNScale is none, or for several steps'),
    (dict(target_params=0.001, min_keep_ratio=0.5), '0.1% of the parameters cannot be reached'),
    (dict(target_params=None), 'have neither a ratio nor a threshold'),
    (dict(compensate='adapt-norms'), 'needs calibration images'),
])
def test_request_that_cannot_be_met(model, options, message):
    """It is refused before anything is trained or changed."""
    state, training = state_of(model), Training()
    options = dict(dict(target_params=0.5, steps=3, finetune=training), **options)
    with pytest.raises(PruningError, match=message):
        prune(model, GROUPS, input_shape=SHAPE, **options)
    assert training.numbers == []
    assert_untouched(model, state)


def test_file_that_is_no_checkpoint(model, tmp_path):
    state, file = state_of(model), tmp_path / 'unfinished.pth'
    file.write_text('nothing')
    with pytest.raises(UserError, match='cannot be read as a checkpoint'):
        prune(model, GROUPS, target_params=0.5, steps=2, input_shape=SHAPE, checkpoint_file=file)
    assert_untouched(model, state)


def test_progress(model):
    seen = []
    prune(model, GROUPS, target_params=0.5, steps=3, input_shape=SHAPE,
          progress=lambda *reported: seen.append(reported))
    assert [item for item in seen if item[0] == 'pruning in steps'] == [
        ('pruning in steps', done, 2) for done in range(3)]
    assert seen.count(('removing channels', 2, 2)) == 3


def test_layers_that_could_not_be_compensated_in_any_step():
    """A layer without bias or normalisation that reads what is removed first."""
    model = make_kind('plain')
    model.pred = nn.Conv2d(6, 2, 1, bias=False)
    result = prune(model, ALL, 0.5, steps=3, input_shape=SHAPE)
    assert result.uncompensated == ['pred']

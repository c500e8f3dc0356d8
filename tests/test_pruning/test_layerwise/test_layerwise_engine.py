# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
from layer_kinds import KINDS, make_kind
from pruning_samples import difference, make_unit, residual_toy, run, tensors, two_branches
from zeroing import zero

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import PruningPlan, prune
from mmgcp.pruning.compensation import Compensated, compensator
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layerwise import LayerwiseCriterion
from mmgcp.pruning.layerwise.engine import order_units
from mmgcp.pruning.select import Limits, select_lowest
from mmgcp.pruning.surgery import gather_channels, remove_and_verify
from mmgcp.registry import TASK_UTILS

SHAPE = (3, 16, 20)
ALL = [dict(name='all', modules=['*'])]


@TASK_UTILS.register_module(force=True)
class Recorder(LayerwiseCriterion):
    """Scores at random, multiplies what the unit's readers have, and remembers its calls.

    Args:
        fails (str, optional): The unit whose update fails.
        alone (str, optional): A set to leave alone.
    """
    calls, adapted, factor = [], {}, 1.01

    def __init__(self, allocation_criterion=None, fails=None, alone=None):
        super().__init__(allocation_criterion)
        self.fails, self.alone = fails, alone
        self.total = 0
        Recorder.calls, Recorder.adapted = [], {}

    def skips(self, model, unit):
        return 'it is let alone' if unit.name == self.alone else None

    def begin(self, model, units, batches, progress):
        self.calls.append(('begin', [unit.name for unit in units]))
        self.total = 100

    def score(self, model, unit, batches):
        self.calls.append(('score', unit.name, self.folded))
        # of the weights that were adapted before, and of what was learned
        seed = int(1e4 * sum(param.double().abs().sum() for param in model.parameters()))
        generator = torch.Generator().manual_seed(seed + self.total)
        self.scores = torch.rand(unit.size, generator=generator)
        return self.scores

    @torch.no_grad()
    def update(self, model, unit, removed, batches):
        if unit.name == self.fails:
            raise RuntimeError('it broke')
        self.calls.append(('update', unit.name, removed.tolist(), self.scores))
        self.total += len(removed)
        for item in unit.side('in'):
            model.get_submodule(item.module).weight.mul_(self.factor)
        Recorder.adapted = copy.deepcopy(model.state_dict())

    def state_dict(self):
        return dict(total=self.total)

    def load_state_dict(self, state):
        self.calls.append(('load', state['total']))
        self.total = state['total']


def recorder(**options):
    return dict(type='mmgcp.Recorder', **options)


def images(shape=SHAPE, number=2):
    return [Batch(torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)), [])
            for seed in range(number)]


def run_prune(model, groups=ALL, ratio=0.5, criterion=None, shape=SHAPE, **options):
    options = dict(dict(batches=images(shape)), **options)
    return prune(model, groups, ratio, criterion=criterion or recorder(), input_shape=shape,
                 **options)


def numbers_of(result):
    return {item.name: len(item.removed) for item in result.plan.units}


def state_of(model):
    """Objects and values of all tensors, what needs gradients, and modes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ({name: (tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad)
             for name, tensor in tensors.items()},
            [module.training for module in model.modules()])


def assert_untouched(model, state):
    found, modes = state_of(model)
    assert found.keys() == state[0].keys() and modes == state[1]
    for name, (tensor, value, *flags) in found.items():
        assert tensor is state[0][name][0] and torch.equal(value, state[0][name][1]), name
        assert flags == list(state[0][name][2:])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_units_are_pruned_as_they_are_computed():
    model = two_branches()
    units, _ = find_units(model, SHAPE)
    assert [item.name for item in units] == ['a.conv', 'b.conv', 'c.conv', 'z.conv']
    order = ['z.conv', 'a.conv', 'b.conv', 'c.conv']
    assert [item.name for item in order_units(model, units, SHAPE)] == order
    run_prune(model)
    assert Recorder.calls[0] == ('begin', order)
    assert [call[:2] for call in Recorder.calls[1:]] == [
        (step, name) for name in order for step in ('score', 'update')]


@pytest.mark.parametrize('ratio, left', [
    (0., dict(z=10, a=7, b=4, c=8)), (0.25, dict(z=7, a=5, b=3, c=6)),
    (0.5, dict(z=5, a=3, b=2, c=4)), (0.9, dict(z=1, a=1, b=1, c=1))])
def test_each_unit_loses_the_ratio(ratio, left):
    model = two_branches()
    result = run_prune(model, ratio=ratio)
    assert {name: getattr(model, name).conv.out_channels for name in left} == left
    assert result.scores == {} and result.plan.thresholds == {'all': ratio}


def test_groups_and_limits():
    model = two_branches()
    groups = [dict(name='z', modules=['z'], ratio=0.8), dict(name='c', modules=['c'], ratio=0.3)]
    result = run_prune(model, groups, None, round_to=2, min_keep_ratio=0.4)
    assert numbers_of(result) == {'z.conv': 6, 'c.conv': 2, 'a.conv': 0, 'b.conv': 0}
    assert [call[1] for call in Recorder.calls[1:]] == ['z.conv', 'z.conv', 'c.conv', 'c.conv']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('compensate', ['fold-means', False])
def test_the_lowest_are_removed(kind, compensate):
    """As many as allocated; the pruned network is the adapted one without them."""
    model = make_kind(kind)
    original, units = copy.deepcopy(model), find_units(model, SHAPE)[0]
    dry = run_prune(model, dry_run=True)
    result = run_prune(model, compensate=compensate)
    assert numbers_of(result) == numbers_of(dry) and any(numbers_of(result).values())
    updates = {call[1]: call for call in Recorder.calls if call[0] == 'update'}
    assert set(updates) == set(result.plan.removed())
    for unit in units:
        if unit.name in updates:
            _, _, removed, scores = updates[unit.name]
            assert removed == result.plan.removed()[unit.name].tolist()
            check_lowest(unit, removed, scores)
    original.load_state_dict(Recorder.adapted)
    expected = zero(original, {key: channels.tolist() for key, channels in gather_channels(
        units, result.plan.removed()).items()})
    assert difference(run(model, 24), run(expected, 24)) < 1e-9


def check_lowest(unit, removed, scores):
    gone = unit.mask(torch.tensor(removed))
    if unit.norm_groups is not None:
        means = torch.stack([scores[unit.norm_groups == group].mean()
                             for group in range(int(unit.norm_groups.max()) + 1)])
        lost = unit.norm_groups[gone].unique()
        assert len(removed) == int(torch.isin(unit.norm_groups, lost).sum())
        assert sorted(means.argsort()[:len(lost)].tolist()) == lost.tolist()
        return
    conv_groups = torch.zeros(unit.size) if unit.conv_groups is None else unit.conv_groups
    for block in conv_groups.unique():
        members = (conv_groups == block).nonzero().flatten()
        number = int(gone[members].sum())
        lowest = members[scores[members].argsort()[:number]]
        assert sorted(lowest.tolist()) == gone.logical_and(conv_groups == block).nonzero().flatten(
            ).tolist()


def test_removed_channels_are_off_for_the_next_unit(monkeypatch):
    """They are zero and get no gradients."""
    seen = []

    def score(self, model, unit, batches):
        handle = model.pred.register_forward_hook(
            lambda _, args, output: seen.append(args[0].detach()))
        with torch.enable_grad():
            sum(tensor.sum() for tensor in tensors(model(batches[0].images))).backward()
        handle.remove()
        seen[-1] = (seen[-1], model.a1.conv.weight.grad.clone())
        model.zero_grad()
        self.scores = torch.arange(unit.size).float()
        return self.scores

    monkeypatch.setattr(Recorder, 'score', score)
    model = residual_toy(3)
    result = run_prune(model, compensate=False)
    assert result.plan.removed()['stem.conv'].tolist() == [0, 1, 2, 3]
    assert [len(item.removed) for item in result.plan.units] == [4, 3, 3]
    (before, _), (after_stem, first), (_, second) = seen
    assert before.abs().sum((0, 2, 3)).all()
    assert not after_stem[:, :4].any() and after_stem[:, 4:].abs().sum((0, 2, 3)).all()
    assert not first[:, :4].any() and first[:, 4:].flatten(1).abs().sum(1).all()
    assert not second[:3].any() and second[3:, 4:].flatten(1).abs().sum(1).all()


def test_another_criterion_allocates():
    options = dict(groups=[dict(name=name, modules=[name]) for name in 'zac'], target_params=0.6,
                   round_to=2, compensate=False, input_shape=SHAPE)
    plain, model = prune(two_branches(), **options), two_branches()
    before = run(model)
    result = prune(model, criterion=recorder(allocation_criterion=dict(type='mmgcp.BNScale')),
                   batches=images(), **options)
    assert numbers_of(result) == {**numbers_of(plain), 'b.conv': 0}
    assert len(result.plan.removed()) > 1
    assert result.plan.removed().keys() == plain.plan.removed().keys()
    assert any(first.removed != second.removed
               for first, second in zip(result.plan.units, plain.plan.units))
    assert (result.params, result.macs) == (plain.params, plain.macs)
    assert result.params[1] == sum(param.numel() for param in model.parameters())
    assert difference(before, run(model)) > 0


def test_budget_in_equal_shares(model):
    """Of YOLOv4: the units of a group lose the same share."""
    result = run_prune(model, 'auto', None, shape=(3, 64, 64), target_flops=0.6, dry_run=True)
    assert result.macs[1] == pytest.approx(0.6 * result.macs[0], rel=0.01)
    found = {}
    for item in result.plan.units:
        found.setdefault(tuple(sorted(set(item.layers.values()))), []).append(item)
    assert len(found) > 4
    for items in found.values():
        shares = [len(item.removed) / item.size for item in items]
        assert max(shares) - min(shares) <= 1 / min(item.size for item in items)


def test_dry_run_scores_nothing():
    model = two_branches()
    state = state_of(model)
    dry = run_prune(model, dry_run=True, batches=None)
    assert Recorder.calls == []
    assert_untouched(model, state)
    assert dry.plan.options['only_counts'] is True
    real = run_prune(model)
    assert real.plan.options['only_counts'] is False
    assert numbers_of(dry) == numbers_of(real)
    assert (dry.params, dry.macs, dry.channels_after) == (
        real.params, real.macs, real.channels_after)


def test_given_plan_needs_no_criterion(tmp_path):
    model = two_branches()
    plan = run_prune(copy.deepcopy(model), criterion=recorder(alone='b.conv')).plan
    plan.save(tmp_path / 'plan.json')
    calls = list(Recorder.calls)
    result = prune(model, plan=PruningPlan.load(tmp_path / 'plan.json'), input_shape=SHAPE,
                   criterion=dict(type='mmgcp.Absent'), finetune=print,
                   checkpoint_file=tmp_path / 'x')
    assert result.plan.units == plan.units and Recorder.calls == calls
    assert plan.skipped['b.conv'] == 'it is let alone' and numbers_of(result)['b.conv'] == 0
    assert plan.options['criterion'] == recorder(alone='b.conv')


@pytest.mark.parametrize('options, message', [
    (dict(batches=None), 'Recorder needs training data'),
    (dict(criterion=recorder(allocation_criterion=recorder())), 'Recorder goes layer by layer'),
    (dict(criterion=dict(type='mmgcp.BNScale'), finetune=print), 'for layer-wise criteria'),
    (dict(ratio=None), 'have neither a ratio nor a threshold'),
])
def test_request_that_cannot_be_met(options, message):
    model = two_branches()
    state = state_of(model)
    with pytest.raises(PruningError, match=message):
        run_prune(model, **options)
    assert_untouched(model, state)


def test_scores_of_a_wrong_shape(monkeypatch):
    monkeypatch.setattr(Recorder, 'score', lambda *args: torch.zeros(3))
    model = two_branches()
    state = state_of(model)
    with pytest.raises(PruningError, match=r"'z.conv' has 10 channels, but .* shape \(3,\)"):
        run_prune(model)
    assert_untouched(model, state)


@pytest.mark.parametrize('when', ['begin', 'score', 'update', 'finetune', 'save', 'surgery'])
def test_failure_restores_everything(when, monkeypatch, tmp_path):
    model = two_branches()
    model.c.eval()
    model.a.conv.weight.requires_grad_(False)
    state, options = state_of(model), {}

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if when in ('begin', 'score'):
        monkeypatch.setattr(Recorder, when, fail)
    elif when == 'update':
        options['criterion'] = recorder(fails='c.conv')
    elif when == 'finetune':
        def options_finetune(model, number):
            model.train()
            model(images()[0].images).sum().backward()
            model.a.conv.weight.data.add_(1)
            if number == 3:
                raise KeyboardInterrupt
        options['finetune'] = options_finetune
    elif when == 'save':
        monkeypatch.setattr('mmgcp.pruning.resume.torch.save', fail)
    else:
        monkeypatch.setattr('mmgcp.pruning.strategy.remove_and_verify',
                            lambda *args: fail(remove_and_verify(*args)))
    with pytest.raises(RuntimeError if when == 'update' else KeyboardInterrupt):
        run_prune(model, checkpoint_file=tmp_path / 'new' / 'file.pth', **options)
    assert_untouched(model, state)
    if when == 'update':
        assert [call[1] for call in Recorder.calls if call[0] == 'update'][-1] == 'b.conv'
    finished = when in ('update', 'finetune', 'surgery')
    assert [path.name for path in tmp_path.glob('new/*')] == (['file.pth'] if finished else [])


@pytest.mark.parametrize('trains', [True, False])
@pytest.mark.parametrize('fails, done', [('a.conv', 1), ('b.conv', 2), ('c.conv', 3)])
def test_resumed_is_as_uninterrupted(fails, done, trains, tmp_path, monkeypatch):
    trained, steps = [], []

    def training(model, number):
        trained.append(number)
        with torch.no_grad():
            model.pred.weight.add_(0.01 * number)
            model.a.bn.running_mean.mul_(1.1)

    def begin(self, model, *_):
        self.total = 100
        model.a.conv.weight.data *= 1.1  # as a joint training would

    monkeypatch.setattr(Recorder, 'begin', begin)
    finetune = training if trains else None
    original = two_branches()
    expected, model = copy.deepcopy(original), copy.deepcopy(original)
    first = run_prune(expected, finetune=finetune)
    assert trained == ([1, 2, 3, 4] if trains else [])
    file, update = tmp_path / 'unfinished.pth', Recorder.update

    def failing(self, model, unit, *args):
        if unit.name == fails:
            raise KeyboardInterrupt
        update(self, model, unit, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, 'update', failing)
        with pytest.raises(KeyboardInterrupt):
            run_prune(model, checkpoint_file=file, finetune=finetune)
    assert file.exists()
    trained.clear()
    second = run_prune(model, checkpoint_file=file, finetune=finetune,
                       progress=lambda *step: steps.append(step))
    assert trained == ([1, 2, 3, 4][done:] if trains else [])
    assert ('resuming', done, 4) in steps
    assert Recorder.calls[0][0] == 'load'
    assert first.plan == second.plan and first.uncompensated == second.uncompensated
    assert_same_weights(expected, model)
    assert list(tmp_path.iterdir()) == [file]
    run_prune(original, checkpoint_file=file, finetune=finetune)  # nothing is left to do
    assert_same_weights(expected, original)
    assert trained == ([1, 2, 3, 4][done:] if trains else [])


def test_norms_are_adapted_at_the_end(monkeypatch):
    """To the model with which the first unit is begun, unless it is trained meanwhile."""
    adapted = []

    def adapt(model, reference, images):
        assert [tuple(batch.shape) for batch in images] == [(2, *SHAPE)] * 2
        assert not model.z.bn(torch.ones(1, 10, 1, 1))[0, removed()].any()  # they are off
        adapted.append(reference.state_dict())

    def removed():
        return next(call[2] for call in Recorder.calls if call[:2] == ('update', 'z.conv'))

    monkeypatch.setattr(compensator, 'adapt_norms', adapt)
    model = two_branches().eval()
    original = copy.deepcopy(model.state_dict())
    run_prune(copy.deepcopy(model), compensate='adapt-norms')
    assert len(adapted) == 1
    assert all(torch.equal(value, original[name]) for name, value in adapted[0].items())
    for options in (dict(compensate='adapt-norms', finetune=lambda *_: None),
                    dict(compensate='fold-means'), dict(compensate=False), {}):
        run_prune(copy.deepcopy(model), **options)
        assert len(adapted) == 1


def test_layers_are_fitted_at_the_end(monkeypatch):
    """To what the first unit is begun with; what criteria have made of the weights is the prior."""
    fitted = []

    def fit(model, units, removed, data, shape, reference):
        assert_same(model.state_dict(), Recorder.adapted)
        assert_same(reference.state_dict(), original)
        fitted.append({name: channels.tolist() for name, channels in removed.items()})
        return Compensated(['b.conv'], {'pred': 'kernel'})

    def assert_same(state, other):
        assert all(torch.equal(value, other[name]) for name, value in state.items())

    monkeypatch.setattr(compensator, 'reconstruct', fit)
    model = two_branches().eval()
    original = copy.deepcopy(model.state_dict())
    result = run_prune(model)
    assert fitted == [{item.name: item.removed for item in result.plan.units if item.removed}]
    assert result.uncompensated == ['b.conv'] and result.fits == {'pred': 'kernel'}


def interrupt(model, file):
    with pytest.raises(RuntimeError, match='it broke'):
        run_prune(model, criterion=recorder(fails='b.conv'), checkpoint_file=file)
    assert file.exists()


@pytest.mark.parametrize('change', ['ratio', 'weights', 'criterion', 'batches', 'finetune'])
def test_another_request_begins_anew(change, tmp_path):
    model, file = two_branches(), tmp_path / 'unfinished.pth'
    interrupt(model, file)
    options = dict(criterion=recorder(fails='b.conv'))
    options.update(dict(
        ratio=dict(ratio=0.3), weights={}, criterion=dict(criterion=recorder()),
        batches=dict(batches=images(number=1)),
        finetune=dict(finetune=lambda model, number: None))[change])
    if change == 'weights':
        model.c.conv.weight.data[0, 0, 0, 0] += 1e-3
    expected = copy.deepcopy(model)
    if change == 'criterion':
        run_prune(model, checkpoint_file=file, **options)
        run_prune(expected)
        assert_same_weights(expected, model)
        assert file.exists()
    else:
        with pytest.raises(RuntimeError, match='it broke'):
            run_prune(model, checkpoint_file=file, **options)
    assert Recorder.calls[0][0] == 'begin'


def test_file_that_is_no_checkpoint(tmp_path):
    model, file = two_branches(), tmp_path / 'unfinished.pth'
    file.write_text('nothing')
    state = state_of(model)
    with pytest.raises(ValueError, match='cannot be read as a checkpoint'):
        run_prune(model, checkpoint_file=file)
    assert_untouched(model, state)


def test_training_between_units_keeps_channels_off():
    """With an optimizer that moves also what has no gradient."""
    model = two_branches()
    model.b.eval()
    model.c.conv.weight.requires_grad_(False)
    model.a.conv.weight.grad = torch.ones_like(model.a.conv.weight)
    grad = model.a.conv.weight.grad
    seen = []

    def finetune(model, number):
        assert all(param.grad is None for param in model.parameters())
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
        for batch in images():
            optimizer.zero_grad()
            found = []
            handle = model.a.conv.register_forward_hook(
                lambda _, args, output, found=found: found.append(args[0]))
            model(batch.images).square().mean().backward()
            handle.remove()
            optimizer.step()
            seen.append((number, found[0].detach().abs().sum((0, 2, 3)) > 0))

    original = copy.deepcopy(model)
    modes = {name: module.training for name, module in model.named_modules()}
    result = run_prune(model, finetune=finetune)
    assert [number for number, _ in seen] == [1, 1, 2, 2, 3, 3, 4, 4]
    removed = result.plan.removed()['z.conv']
    assert all((~mask).nonzero().flatten().tolist() == removed.tolist() for _, mask in seen)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not model.c.conv.weight.requires_grad and model.z.conv.weight.requires_grad
    assert grad.eq(1).all() and original.a.conv.weight.shape[0] == 7
    assert result.plan.options['finetune'] is True
    assert not torch.equal(model.pred.bias, original.pred.bias)


def test_one_shot_data():
    model, other = two_branches(), two_branches()
    first = run_prune(model, batches=iter(images()),
                      calibration=(batch.images for batch in images()))
    second = run_prune(other, calibration=[batch.images for batch in images()])
    assert first.plan == second.plan
    assert_same_weights(model, other)


def test_batches_calibrate_if_nothing_else_does(monkeypatch):
    monkeypatch.setattr(Recorder, 'factor', 1.)
    models = [two_branches() for _ in range(3)]
    run_prune(models[0])
    assert {call[2] for call in Recorder.calls if call[0] == 'score'} == {True}
    run_prune(models[1], calibration=[batch.images for batch in images()])
    run_prune(models[2], compensate=False)
    assert {call[2] for call in Recorder.calls if call[0] == 'score'} == {False}
    assert_same_weights(models[0], models[1])
    assert not torch.equal(models[0].pred.bias, models[2].pred.bias)


def test_sensitivity_is_measured_on_the_allocation():
    model = two_branches()
    groups = [dict(name=name, modules=[name]) for name in 'zac']
    criterion = recorder(allocation_criterion=dict(type='mmgcp.BNScale'))
    result = run_prune(model, groups, None, criterion=criterion,
                       evaluate=lambda model: 1 + float(model.a.bn.weight.sum()) * 0,
                       target_params=0.6, round_to=2)
    assert set(result.plan.options['sensitivity']['metrics']) == set('zac')
    assert 0.5 < result.params[1] / result.params[0] <= 0.6 and len(result.plan.removed()) > 1


def choose(single, unit, scores, allocated, **options):
    return select_lowest(unit, scores, torch.tensor(allocated), Limits(**options)).tolist()


def test_choice_in_blocks(single):
    """Each block and the free channels lose as many as allocated."""
    unit = make_unit(12, conv_groups=torch.tensor([0] * 4 + [1] * 4 + [-1] * 4))
    scores = torch.tensor([9., 8, 7, 6, 1, 2, 3, 4, 0, 5, 11, 10])
    assert choose(single, unit, scores, [0, 4, 9]) == [3, 4, 8]
    assert choose(single, unit, scores, [0, 1, 4, 5, 8, 9, 10]) == [2, 3, 4, 5, 8, 9, 11]


def test_choice_keeps_a_channel_of_each_part(single):
    unit = make_unit(12, range(3))
    scores = torch.arange(12.)
    assert choose(single, unit, scores, [3, 4, 5]) == [0, 1, 3]
    assert choose(single, unit, scores, range(3, 12)) == [0, 1, *range(3, 10)]


def test_channels_without_a_score_stay(single):
    scores = torch.tensor([float('nan'), 3, 1, 2, float('nan'), 0, 9, 9, 9, 9, 9, 9])
    assert choose(single, make_unit(12), scores, [0, 1, 2]) == [2, 3, 5]


def test_choice_of_whole_units(single):
    unit = make_unit(12, norm_groups=torch.arange(12) // 3)
    scores = torch.tensor([0., 9, 9, 5, 5, 5, 8, 8, 8, 1, 1, 1])
    assert choose(single, unit, scores, [0, 1, 2]) == [9, 10, 11]
    assert choose(single, unit, scores, range(6)) == [3, 4, 5, 9, 10, 11]

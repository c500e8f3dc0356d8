# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What DynamicSparsityHook does beside adding a subgradient to all scale factors."""
import json
import sys

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmyolo.models.layers import ExpMomentumEMA
from test_dynamic_sparsity_hook import (  # noqa: F401  amp_on_cpu is a fixture
    AMP,
    GAMMA,
    TinyModel,
    amp_on_cpu,
    assert_gamma_differs_by,
    batches,
    make_runner,
    signs,
    trained,
)
from torch import nn

from mmgcp.errors import UserError
from mmgcp.sparsity import DynamicSparsityHook

PROXIMAL = dict(rate=1., penalty='proximal')
SHAPE = (1, 32, 32)  # of the images for Residual


class Residual(BaseModel):
    """A shortcut, so that stem_bn and bn2 are coupled; head_bn is of the predictions."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Conv2d(1, 3, 1)
        self.backbone.stem_bn = nn.BatchNorm2d(3)
        self.backbone.conv1 = nn.Conv2d(3, 4, 1)
        self.backbone.bn1 = nn.BatchNorm2d(4)
        self.backbone.conv2 = nn.Conv2d(4, 3, 1)
        self.backbone.bn2 = nn.BatchNorm2d(3)
        self.head = nn.Conv2d(3, 2, 1)
        self.head_bn = nn.BatchNorm2d(2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def forward(self, inputs, mode='tensor'):
        parts = self.backbone
        x = parts.stem_bn(parts.stem(inputs)).relu()
        x = x + parts.bn2(parts.conv2(parts.bn1(parts.conv1(x)).relu()))
        x = self.head_bn(self.head(x))
        if mode == 'tensor':
            return x
        target = torch.linspace(-1, 2, x[0].numel()).view_as(x[0])
        return dict(loss=(x - target).abs().mean())

    def gammas(self):
        return {name: value.detach().clone() for name, value in self.named_parameters()
                if 'bn' in name and name.endswith('weight')}


def hook_of(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, DynamicSparsityHook))


def soft_threshold(values, threshold):
    return values.sign() * (values.abs() - threshold).clamp(min=0)


def assert_thresholded(with_hook, without, threshold):
    """All is equal except the scale factors, which are soft-thresholded."""
    expected = without.state_dict()
    for name, value in with_hook.state_dict().items():
        if name in ('bn1.weight', 'bn2.weight'):
            wanted = soft_threshold(expected[name], threshold)
            assert not torch.equal(wanted, expected[name])
            torch.testing.assert_close(value, wanted)
            assert torch.equal(value == 0, wanted == 0)
        else:
            assert torch.equal(value, expected[name]), name


# Proximal steps

@pytest.mark.parametrize('optimizer', [
    dict(type='SGD', lr=0.1), dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True),
    dict(type='Adam', lr=0.1), dict(type='AdamW', lr=0.1, weight_decay=0.)])
def test_proximal_step(tmp_path, optimizer):
    models = [trained(tmp_path, hook, optim_wrapper=dict(optimizer=dict(optimizer)))
              for hook in (PROXIMAL, None)]
    assert_thresholded(*models, 0.1 * 1.)


def test_proximal_step_makes_exact_zeros(tmp_path):
    model = trained(tmp_path, dict(PROXIMAL, rate=1e3))
    assert not model.bn1.weight.any() and not model.bn2.weight.any()


def test_proximal_step_has_the_learning_rate_of_the_group_at_that_step(tmp_path):
    model = TinyModel()
    model.bn1.weight.data = torch.tensor([0.5, -0.25, 0.01])
    for layer in (model.bn1, model.bn2):
        layer.weight.register_hook(torch.zeros_like)
    initial = [layer.weight.detach().clone() for layer in (model.bn1, model.bn2)]
    groups = [dict(params=[model.bn1.weight], lr=0.01), dict(params=[model.bn2.weight], lr=0.2)]
    wrapper = OptimWrapper(torch.optim.SGD(groups, lr=0.1))
    halving = dict(type='ConstantLR', factor=0.5, begin=0, end=3, by_epoch=False)
    trained(tmp_path, PROXIMAL, model, iters=3, optim_wrapper=wrapper, param_scheduler=[halving])
    for layer, start, lr in zip((model.bn1, model.bn2), initial, (0.01, 0.2)):
        torch.testing.assert_close(
            layer.weight.detach(), soft_threshold(start, lr * (0.5 + 0.5 + 1)))
    assert model.bn1.weight[2] == 0 and model.bn1.weight[1] == -0.23


def test_proximal_step_once_per_update_when_accumulating(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=4)
    models = [trained(tmp_path, hook, iters=4, optim_wrapper=dict(wrapper))
              for hook in (PROXIMAL, None)]
    assert_thresholded(*models, 0.1)


@pytest.mark.parametrize('fused', [False, True])
def test_proximal_step_under_amp(tmp_path, amp_on_cpu, fused):  # noqa: F811
    wrapper = dict(AMP, optimizer=dict(type='SGD', lr=0.1, fused=fused))
    models = [trained(tmp_path, hook, optim_wrapper=dict(wrapper)) for hook in (PROXIMAL, None)]
    assert_thresholded(*models, 0.1)


@pytest.mark.parametrize('fused', [False, True])
def test_nothing_happens_on_a_skipped_step(tmp_path, amp_on_cpu, fused):  # noqa: F811
    model = TinyModel()
    model.conv2.weight.register_hook(lambda grad: grad * float('inf'))
    wrapper = dict(AMP, optimizer=dict(type='SGD', lr=0.1, fused=fused))
    runner = make_runner(tmp_path, dict(PROXIMAL, schedule=dict(type='feedback', target=1)), model,
                         iters=2, optim_wrapper=wrapper)
    runner.train()
    for (name, parameter), initial in zip(model.named_parameters(), TinyModel().parameters()):
        assert torch.equal(parameter, initial), name
    assert hook_of(runner).schedule.state_dict() == dict(log_factor=0., progress=None)


def test_proximal_step_leaves_frozen_and_unused_layers_alone(tmp_path):
    model = TinyModel()
    model.bn1.weight.requires_grad_(False)
    model.unused = nn.BatchNorm2d(2)
    trained(tmp_path, PROXIMAL, model)
    assert torch.equal(model.bn1.weight, GAMMA)
    assert torch.equal(model.unused.weight, torch.ones(2))


@pytest.mark.parametrize('penalty', ['subgradient', 'proximal'])
def test_tensors_stay_the_same(tmp_path, penalty):
    """MMYOLO's EMA looks at those of the beginning."""
    model = Residual()
    ema = ExpMomentumEMA(model, update_buffers=True)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    trained(tmp_path, dict(rate=3., penalty=penalty, coupled=True, modules='prunable',
                           input_shape=SHAPE), model)
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    ema.update_parameters(model)
    for name in model.gammas():
        assert torch.equal(ema.module.get_parameter(name), model.get_parameter(name))


# Weight decay

OPTIMIZERS = {
    'sgd': lambda groups: torch.optim.SGD(groups, lr=0.1),
    'nesterov': lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    'adam': lambda groups: torch.optim.Adam(groups, lr=0.1),
    'adamw': lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.),
    'rmsprop': lambda groups: torch.optim.RMSprop(groups, lr=0.1)}


def groups_of(model, gamma_decay):
    gammas = {model.bn1.weight, model.bn2.weight}
    return [dict(params=list(gammas), weight_decay=gamma_decay),
            dict(params=[p for p in model.parameters() if p not in gammas], weight_decay=0.3)]


@pytest.mark.parametrize('penalty', ['subgradient', 'proximal'])
@pytest.mark.parametrize('make', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_weight_decay_is_removed_bit_for_bit(tmp_path, make, penalty):

    def run(gamma_decay, weight_decay):
        model = TinyModel()
        wrapper = OptimWrapper(make(groups_of(model, gamma_decay)))
        hook = dict(rate=0.03, penalty=penalty, weight_decay=weight_decay, histogram_interval=0)
        return trained(tmp_path, hook, model, iters=5, optim_wrapper=wrapper)

    removed, without, kept = run(0.3, 'remove'), run(0., 'keep'), run(0.3, 'keep')
    for name, value in without.state_dict().items():
        assert torch.equal(removed.state_dict()[name], value), name
    assert not torch.equal(kept.bn1.weight, without.bn1.weight)


def test_groups_of_the_optimizer_are_as_before(tmp_path):
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    groups, contents = optimizer.param_groups, [dict(group) for group in optimizer.param_groups]
    trained(tmp_path, dict(rate=0.01), model, iters=3, optim_wrapper=OptimWrapper(optimizer))
    assert optimizer.param_groups is groups
    assert [dict(group) for group in groups] == contents


def test_a_broken_off_step_does_not_spoil_the_groups(tmp_path):
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    runner = make_runner(tmp_path, dict(rate=0.01), model, optim_wrapper=OptimWrapper(optimizer))
    runner.train()
    groups, hook = optimizer.param_groups, hook_of(runner)
    hook.before_train(runner)

    def broken():
        raise RuntimeError('out of memory')

    for _ in range(2):
        with pytest.raises(RuntimeError, match='out of memory'):
            optimizer.step(broken)
        assert optimizer.param_groups is not groups
    hook.after_train(runner)
    assert optimizer.param_groups is groups


class OwnStep(torch.optim.SGD):

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize('decay, option, make, said', [
    (0.3, 'remove', torch.optim.SGD, '2 would have weight decay of SGD, which is removed'),
    (0.3, 'keep', torch.optim.SGD, '2 have weight decay of SGD, which is kept'),
    (0., 'remove', torch.optim.SGD, 'none has weight decay'),
    (0.3, 'remove', OwnStep, '2 have weight decay of OwnStep, which is kept, as it is unknown')])
def test_what_is_said_about_weight_decay(tmp_path, decay, option, make, said):
    model = TinyModel()
    wrapper = OptimWrapper(make(groups_of(model, decay), lr=0.1))
    hook = dict(rate=0.01, weight_decay=option)
    trained(tmp_path, hook, model, optim_wrapper=wrapper)
    printed = next(tmp_path.glob('*/*.log')).read_text()
    assert printed.count(f'of the scale factors of 2 BatchNorm layers {said}') == 1
    removed = trained(tmp_path, hook, optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)))
    is_off = decay == 0 or (option == 'remove' and make is torch.optim.SGD)
    assert torch.equal(model.bn1.weight, removed.bn1.weight) == is_off


# Which channels, and how strongly

def test_prunable_channels(tmp_path):
    models = [trained(tmp_path, hook, Residual()) for hook in (
        dict(rate=0.01, modules='prunable', exclude=['*.bn1'], input_shape=SHAPE), dict(rate=0))]
    for name, initial in Residual().gammas().items():
        pressed = name in ('backbone.stem_bn.weight', 'backbone.bn2.weight')
        expected = models[1].gammas()[name] - pressed * 0.1 * 0.01 * initial.sign()
        torch.testing.assert_close(models[0].gammas()[name], expected)


@pytest.mark.parametrize('penalty', ['subgradient', 'proximal'])
def test_coupled_step_by_hand(tmp_path, penalty):
    hook = dict(rate=0.3, coupled=True, penalty=penalty, input_shape=SHAPE)
    pressed, plain = (trained(tmp_path, options, Residual()).gammas()
                      for options in (hook, dict(hook, rate=0)))
    start = Residual().gammas() if penalty == 'subgradient' else plain
    shared = torch.stack([start['backbone.stem_bn.weight'], start['backbone.bn2.weight']])
    for name, values in start.items():
        if name in ('backbone.stem_bn.weight', 'backbone.bn2.weight'):
            norm, weight = shared.norm(dim=0), 2**0.5
        else:
            norm, weight = values.abs(), 1.
        step = torch.tensor(0.1 * 0.3 * weight)
        if penalty == 'proximal':
            step = torch.min(step, norm)
        torch.testing.assert_close(pressed[name], plain[name] - step * values / norm)
        assert not torch.equal(pressed[name], plain[name])


def test_without_torch_pruning(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_pruning', None)
    monkeypatch.delitem(sys.modules, 'mmgcp.pruning.dependencies', raising=False)  # imports it
    for options in (dict(modules='prunable'), dict(coupled=True)):
        with pytest.raises(UserError, match='needs Torch-Pruning .* not installed'):
            make_runner(tmp_path, dict(options, input_shape=SHAPE), Residual()).train()
    make_runner(tmp_path, dict(groups='auto', input_shape=SHAPE), Residual()).train()


class NeedsSamples(TinyModel):
    """Does not run on an image alone, and has no parts that would."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'tensor':
            raise ValueError('no samples')
        return super().forward(inputs, mode)


def test_model_that_cannot_be_traced(tmp_path):
    with pytest.raises(UserError, match="modules='prunable' and coupled=True look .* but the "
                       'model cannot be run on an image alone: .*no samples'):
        make_runner(tmp_path, dict(modules='prunable'), NeedsSamples()).train()


@pytest.mark.parametrize('penalty', ['subgradient', 'proximal'])
def test_rate_factors(tmp_path, penalty):
    groups = [dict(name='first', modules=['bn1'], rate_factor=5)]
    models = [trained(tmp_path, hook) for hook in (
        dict(rate=0.01, groups=groups, penalty=penalty), None)]
    if penalty == 'subgradient':
        sign1, sign2 = signs()
        assert_gamma_differs_by(*models, 0.1 * 0.05 * sign1, 0.1 * 0.01 * sign2)
    for layer, threshold in (('bn1', 0.005), ('bn2', 0.001)):
        pressed, plain = (getattr(model, layer).weight.detach() for model in models)
        if penalty == 'proximal':
            torch.testing.assert_close(pressed, soft_threshold(plain, threshold))


def test_logged_loss_has_the_factors(tmp_path):
    groups = [dict(name='first', modules=['bn1'], rate_factor=5)]
    model = TinyModel()
    runner = make_runner(tmp_path, dict(rate=0.01, groups=groups, near_zero_thr=0.3), model)
    runner.train()
    sums = [layer.weight.abs().sum().item() for layer in (model.bn1, model.bn2)]
    found = {name: runner.message_hub.get_scalar(f'train/sparsity_{name}').current()
             for name in ('rate', 'loss', 'near_zero/first', 'near_zero/other')}
    assert found['rate'] == pytest.approx(0.01 * (3 * 5 + 2) / 5)
    assert found['loss'] == pytest.approx(0.01 * (5 * sums[0] + sums[1]))
    assert found['near_zero/first'] == pytest.approx(2 / 3)
    assert found['near_zero/other'] == 0


def test_names_of_groups_in_logs(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    visualizer = dict(type='Visualizer', vis_backends=[
        dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])
    runner = make_runner(
        tmp_path, dict(groups='auto', near_zero_thr=0.5, log_interval=1, input_shape=SHAPE),
        Residual(), visualizer=visualizer,
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)))
    runner.train()
    names = ['sparsity_near_zero/backbone-1', 'sparsity_near_zero/head-1']
    row = json.loads(next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()[0])
    printed = next(tmp_path.glob('*/*.log')).read_text()
    events = EventAccumulator(str(next(tmp_path.glob('*/vis_data'))), dict(histograms=0))
    events.Reload()
    for name, parts in zip(names, (('stem_bn', 'bn1', 'bn2'), ('head_bn', ))):
        values = torch.cat([value for key, value in runner.model.gammas().items()
                            if key.split('.')[-2] in parts])
        share = (values.abs() < 0.5).float().mean().item()
        assert row[name] == pytest.approx(share)
        assert f'{name}: {share:.4f}' in printed
        assert events.Scalars(name)[0].value == pytest.approx(share)
        group = name.split('/')[1]
        assert events.Histograms(f'sparsity/gamma/{group}')[0].histogram_value.num == len(values)
    images = list(tmp_path.glob('*/vis_data/vis_image/*'))
    assert [path.name for path in images] == ['sparsity_gamma_histogram_1.png']


@pytest.mark.parametrize('groups, message', [
    ([dict(name='a', modules=['neck.*'])], r"pattern 'neck\.\*' of layer group 'a' matches no"),
    ([dict(name='a', modules=['bn1']), dict(name='b', modules=['bn?'])],
     "'bn1' is in two layer groups: 'a' and 'b'"),
    ([dict(name='a', modules=['bn1']), dict(name='a', modules=['bn2'])],
     'names of the groups must differ'),
    ([dict(name='a', modules=['conv1'])], "group 'a' has none of the chosen")])
def test_wrong_groups(tmp_path, groups, message):
    with pytest.raises(UserError, match=message):
        make_runner(tmp_path, dict(groups=groups)).train()


@pytest.mark.parametrize('wrong, message', [
    (dict(penalty='l2'), "penalty must be one of .* but is 'l2'"),
    (dict(weight_decay='half'), "weight_decay must be one of .* but is 'half'"),
    (dict(modules='prunables'), "modules .* is 'prunables'"),
    (dict(exclude='prunable'), "exclude .* is 'prunable'"),
    (dict(groups='manual'), "groups .* is 'manual'"),
    (dict(groups=['a']), r"groups .* is \['a'\]"),
    (dict(groups=[dict(name='a')]), r"has \['name'\]"),
    (dict(groups=[dict(name='a', modules=['b'], ratio=1)]), 'ratio'),
    (dict(groups=[dict(name='a', modules='b')]), "'a' must .* is 'b'"),
    (dict(groups=[dict(name='a', modules=['b'], rate_factor=-2)]), "'a' .* is -2"),
    (dict(groups=[dict(name='other', modules=['b'])]), "name 'other'")])
def test_wrong_arguments(wrong, message):
    with pytest.raises(UserError, match=message):
        DynamicSparsityHook(**wrong)


# The state of the schedule, and resuming

SCHEDULES = dict(
    constant={}, two_phase={}, linear={}, cosine={}, step=dict(milestones=[0.4, 0.6]),
    feedback=dict(target=0.9))


@pytest.mark.parametrize('penalty', ['subgradient', 'proximal'])
@pytest.mark.parametrize('schedule', SCHEDULES)
def test_resumed_training_is_bit_for_bit_the_same(tmp_path, schedule, penalty):
    options = dict(
        hook=dict(rate=0.05, penalty=penalty, schedule=dict(type=schedule, **SCHEDULES[schedule]),
                  coupled=True, modules='prunable', near_zero_thr=0.3, histogram_interval=0,
                  input_shape=SHAPE,
                  groups=[dict(name='stem', modules=['backbone.stem_bn'], rate_factor=2.)]),
        iters=2, epochs=3,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.1), accumulative_counts=1))
    whole = make_runner(tmp_path, model=Residual(), **options)
    whole.train()
    resumed = make_runner(tmp_path, model=Residual(), resume=True,
                          load_from=str(tmp_path / 'epoch_1.pth'), **options)
    # Logging more often must not matter
    hook_of(resumed).log_interval = 1
    resumed.train()
    assert resumed.iter == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    if schedule == 'feedback':
        state = hook_of(whole).schedule.state_dict()
        assert state == hook_of(resumed).schedule.state_dict()
        assert state['log_factor'] != 0


FEEDBACK = dict(rate=0.05, schedule=dict(type='feedback', target=0.9))


def save_checkpoint(tmp_path, hook):
    runner = make_runner(tmp_path, hook, iters=2, epochs=2, default_hooks=dict(
        checkpoint=dict(type='CheckpointHook', interval=1)))
    runner.train()
    return str(tmp_path / 'epoch_1.pth')


def test_weights_alone_do_not_bring_the_state(tmp_path):
    checkpoint = save_checkpoint(tmp_path, FEEDBACK)
    saved = torch.load(checkpoint)['sparsity_schedule']
    assert saved['type'] == 'FeedbackSchedule' and saved['state']['log_factor'] > 0
    models = [trained(tmp_path / 'other', hook, load_from=checkpoint)
              for hook in (FEEDBACK, dict(rate=0))]
    # The first step has the factor 1, and of the five channels only the largest is spared.
    start = torch.load(checkpoint)['state_dict']
    values = torch.cat([start['bn1.weight'], start['bn2.weight']])
    rates = torch.where(values.abs() == values.abs().max(), 0.01 * 0.05, 0.05)
    penalty1, penalty2 = (0.1 * rates * values.sign()).split([3, 2])
    assert_gamma_differs_by(*models, penalty1, penalty2)


def test_resuming_with_another_schedule_is_said(tmp_path):
    checkpoint = save_checkpoint(tmp_path, dict(rate=0.05))
    assert 'sparsity_schedule' not in torch.load(checkpoint)
    runner = make_runner(tmp_path / 'resumed', FEEDBACK, iters=2, epochs=2, resume=True,
                         load_from=checkpoint)
    runner.train()
    assert runner.iter == 4
    printed = next(tmp_path.glob('resumed/*/*.log')).read_text()
    said = 'has no state of a FeedbackSchedule, which starts from the beginning'
    assert printed.count(said) == 1


def test_state_moves_once_per_update(tmp_path):
    """Not for each iteration, log or optimizer."""
    updates = []

    class TwoOptimizers(TinyModel):

        def train_step(self, data, optim_wrapper):
            optim_wrapper.update_params(self(data['inputs'])['loss'])
            return {}

    class Wrappers(OptimWrapperDict):

        def update_params(self, loss):
            loss.backward()
            for wrapper in self.values():
                wrapper.step()

    model = TwoOptimizers()
    wrappers = Wrappers(
        conv=OptimWrapper(torch.optim.SGD(model.conv1.parameters(), lr=0.1)),
        a=OptimWrapper(torch.optim.SGD([model.bn1.weight], lr=0.1)),
        b=OptimWrapper(torch.optim.SGD([model.bn1.weight, model.bn2.weight], lr=0.1)))
    accumulating = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=2)
    for options, wanted in ((dict(model=model, optim_wrapper=wrappers), [0, 0.25, 0.5, 0.75]),
                            (dict(optim_wrapper=accumulating), [0.25, 0.75])):
        runner = make_runner(tmp_path, dict(FEEDBACK, log_interval=1), iters=4, **options)
        updates = []
        hook_of(runner).schedule.update = lambda *values, updates=updates: updates.append(values)
        runner.train()
        assert [progress for _, progress in updates] == wanted
        assert all(0 <= near_zero <= 1 for near_zero, _ in updates)


def test_schedules_of_others_need_only_rates(tmp_path):
    runner = make_runner(tmp_path, dict(rate=0.01))

    class Plain:

        def rates(self, magnitudes, rate, progress):
            return 3 * rate

    hook_of(runner).schedule = Plain()
    runner.train()
    assert_gamma_differs_by(
        runner.model, trained(tmp_path), *(0.1 * 0.03 * sign for sign in signs()))


def test_feedback_steers_a_training(tmp_path):
    """The share follows the target, and what is kept stays large."""
    torch.manual_seed(0)

    class Wide(BaseModel):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 40, 1)
            self.bn = nn.BatchNorm2d(40)
            self.register_buffer('target', torch.linspace(0.2, 1, 40)[:, None, None])

        def forward(self, inputs, mode='tensor'):
            noise = self.bn(self.conv(inputs)).std((0, 2, 3))
            return dict(loss=((noise - self.target.flatten())**2).sum())

    hook = dict(rate=1., penalty='proximal', schedule=dict(type='feedback', target=0.5),
                histogram_interval=0)
    runner = make_runner(tmp_path, hook, Wide(), train_dataloader=batches(100),
                         optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.02)))
    runner.train()
    magnitudes = runner.model.bn.weight.detach().abs().numpy()
    assert np.mean(magnitudes == 0) == pytest.approx(0.5, abs=0.06)
    assert magnitudes[magnitudes > 0].mean() > 0.5

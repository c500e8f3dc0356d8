# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import functools
import re

import cv2
import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.runner import Runner
from torch import nn

from mmgcp.compatibility import version_number
from mmgcp.errors import UserError
from mmgcp.sparsity import DynamicSparsityHook, select_scale_factors
from mmgcp.sparsity.logs import draw_gamma_histogram

GAMMA = torch.tensor([0.5, -0.25, 0.0])


class TinyModel(BaseModel):
    """Two convolutions with BatchNorm; the gradients are nowhere zero."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 1)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 2, 1)
        self.bn2 = nn.BatchNorm2d(2)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.bn1.weight.data = GAMMA.clone()

    def forward(self, inputs, mode='tensor'):
        outputs = self.bn2(self.conv2(self.bn1(self.conv1(inputs))))
        target = torch.linspace(-1, 2, outputs[0].numel()).view_as(outputs[0])
        return dict(loss=(outputs - target).abs().mean())


class InTrainFreezing(TinyModel):
    """Freezes in train(), as MMDetection's backbones do."""

    def train(self, mode=True):
        super().train(mode)
        self.bn1.weight.requires_grad_(False)
        return self


def batches(count):
    generator = torch.Generator().manual_seed(1)
    data = [dict(inputs=torch.randn(1, 4, 4, generator=generator)) for _ in range(2 * count)]
    return torch.utils.data.DataLoader(data, batch_size=2, shuffle=False)


def make_runner(work_dir, hook=None, model=None, iters=1, epochs=1, optim_wrapper=None, **kwargs):
    hooks = [] if hook is None else [dict(type='mmgcp.DynamicSparsityHook', **hook)]
    make_runner.count = getattr(make_runner, 'count', 0) + 1
    kwargs.setdefault('train_dataloader', batches(iters))
    return Runner(
        model or TinyModel(),
        work_dir=str(work_dir),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=optim_wrapper or dict(optimizer=dict(type='SGD', lr=0.1)),
        custom_hooks=hooks,
        default_scope='mmyolo',
        experiment_name=f'sparsity_{make_runner.count}',
        **kwargs)


def trained(*args, **kwargs):
    """The model after training."""
    runner = make_runner(*args, **kwargs)
    runner.train()
    return runner.model


def assert_gamma_differs_by(with_hook, without, penalty1, penalty2):
    """All is equal except the scale factors, which the penalty has moved."""
    expected = {name: value.clone() for name, value in without.state_dict().items()}
    expected['bn1.weight'] -= penalty1
    expected['bn2.weight'] -= penalty2
    for name, value in with_hook.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], msg=lambda text, name=name: f'{name}: {text}')


def signs():
    return GAMMA.sign(), TinyModel().bn2.weight.detach().sign()


def test_one_step_of_sgd(tmp_path):
    model = TinyModel()
    parameters = [id(p) for p in model.parameters()]
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.3))
    trained(tmp_path, dict(rate=0.01, weight_decay='keep'), model, optim_wrapper=wrapper)

    by_hand = TinyModel()
    by_hand.train()
    by_hand(next(iter(batches(1)))['inputs'])['loss'].backward()
    for name, parameter in by_hand.named_parameters():
        step = parameter.grad + 0.3 * parameter.detach()
        if name in ('bn1.weight', 'bn2.weight'):
            step = step + 0.01 * parameter.detach().sign()
        torch.testing.assert_close(
            model.get_parameter(name).detach(), parameter.detach() - 0.1 * step)
    assert parameters == [id(p) for p in model.parameters()]


def test_once_per_update_when_accumulating(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1), accumulative_counts=4)
    models = [trained(tmp_path, hook, iters=4, optim_wrapper=dict(wrapper))
              for hook in (dict(rate=0.01), None)]
    assert_gamma_differs_by(*models, *(0.1 * 0.01 * sign for sign in signs()))


def test_penalty_is_not_clipped(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.1), clip_grad=dict(max_norm=1e-4))
    models = [trained(tmp_path, hook, optim_wrapper=dict(wrapper))
              for hook in (dict(rate=0.01), None)]
    assert_gamma_differs_by(*models, *(0.1 * 0.01 * sign for sign in signs()))


@pytest.fixture
def amp_on_cpu(monkeypatch):
    """Let AmpOptimWrapper work without a GPU, with a real scaler."""
    if version_number(torch.__version__) < (2, 4, 0):
        pytest.skip('torch has no GradScaler or fused SGD for the CPU')
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp_optimizer_wrapper, 'GradScaler',
                        functools.partial(torch.amp.GradScaler, 'cpu'))


AMP = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(init_scale=1024.0))


@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=1e-3)])
@pytest.mark.parametrize('optimizer', [
    dict(type='SGD', lr=0.1), dict(type='SGD', lr=0.1, fused=True)])
def test_amp_does_not_scale_the_penalty(tmp_path, amp_on_cpu, clip_grad, optimizer):
    wrapper = dict(AMP, clip_grad=clip_grad, optimizer=optimizer)
    models = [trained(tmp_path, hook, optim_wrapper=dict(wrapper))
              for hook in (dict(rate=0.01), None)]
    assert_gamma_differs_by(*models, *(0.1 * 0.01 * sign for sign in signs()))


def test_fused_optimizer_has_the_scale(amp_on_cpu):
    """Otherwise the test above would not exercise that branch."""
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(opt.grad_scale))
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    assert seen[0].item() == 1024.0


@pytest.mark.parametrize('fused', [False, True])
def test_no_penalty_on_a_skipped_step(tmp_path, amp_on_cpu, fused):
    model = TinyModel()
    model.conv2.weight.register_hook(lambda grad: grad * float('inf'))
    wrapper = dict(AMP, optimizer=dict(type='SGD', lr=0.1, fused=fused))
    trained(tmp_path, dict(rate=0.01), model, optim_wrapper=wrapper)
    for (name, parameter), initial in zip(model.named_parameters(), TinyModel().parameters()):
        assert torch.equal(parameter, initial), name


def two_phase_by_hand(gammas, rate, in_second_phase):
    """What each gamma's gradient gets, in NumPy."""
    magnitudes = np.abs(np.concatenate(gammas))
    threshold = np.percentile(magnitudes, 65)
    return [rate * np.sign(gamma)
            * np.where(in_second_phase & (np.abs(gamma) >= threshold), 0.01, 1)
            for gamma in gammas]


def test_two_phase(tmp_path):
    """Ten iterations with zero gradient of the loss: the penalty alone moves gamma."""
    model = TinyModel()
    for layer in (model.bn1, model.bn2):
        layer.weight.register_hook(torch.zeros_like)
    gammas = [m.weight.detach().double().numpy().copy() for m in (model.bn1, model.bn2)]
    for iteration in range(10):
        steps = two_phase_by_hand(gammas, 0.05, iteration >= 4)
        gammas = [gamma - 0.1 * step for gamma, step in zip(gammas, steps)]
    trained(tmp_path, dict(rate=0.05, schedule=dict(type='two_phase')), model, iters=5, epochs=2)
    for layer, expected in zip((model.bn1, model.bn2), gammas):
        np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-5, atol=1e-7)


def test_frozen_layer_is_left_alone(tmp_path):
    for model in (TinyModel(), InTrainFreezing()):
        model.bn1.weight.requires_grad_(isinstance(model, InTrainFreezing))
        runner = make_runner(tmp_path, dict(rate=0.01), model)
        runner.train()
        assert torch.equal(model.bn1.weight, GAMMA)
        # Nor do its channels count: of those of bn2, none is near zero, one of bn1 is.
        assert runner.message_hub.get_scalar('train/sparsity_near_zero').current() == 0


def test_frozen_layers_alone_are_an_error(tmp_path):
    """Training them would be for nothing; some freeze only when training starts."""
    for freezes_late in (False, True):
        model = InTrainFreezing() if freezes_late else TinyModel()
        model.bn1.weight.requires_grad_(freezes_late)
        runner = make_runner(tmp_path, dict(rate=0.01, modules=['bn1']), model)
        with pytest.raises(UserError, match='all 1 BatchNorm layers that were chosen are frozen'):
            runner.train()
        assert torch.equal(model.bn1.weight, GAMMA)


def test_layer_without_gradient_is_left_alone(tmp_path):
    model = TinyModel()
    model.unused = nn.BatchNorm2d(2)
    trained(tmp_path, dict(rate=0.01), model)
    assert torch.equal(model.unused.weight, torch.ones(2))
    assert model.unused.weight.grad is None


def test_zero_rate_changes_nothing(tmp_path):
    models = [trained(tmp_path, hook) for hook in (dict(rate=0), None)]
    assert_gamma_differs_by(*models, 0, 0)


def test_several_optimizers(tmp_path):
    """A gamma that two optimizers hold gets its penalty from the first of them."""

    class TwoOptimizers(TinyModel):

        def train_step(self, data, optim_wrapper):
            optim_wrapper.update_params(self(data['inputs'])['loss'])
            return {}

    class Wrappers(OptimWrapperDict):

        def update_params(self, loss):
            loss.backward()
            for wrapper in self.values():
                wrapper.step()
            for wrapper in self.values():
                wrapper.zero_grad()

    def run(hook):
        model = TwoOptimizers()
        first = torch.optim.SGD([model.bn1.weight], lr=0.1)
        second = torch.optim.SGD([model.bn1.weight, model.bn2.weight], lr=0.2)
        trained(tmp_path, hook, model,
                optim_wrapper=Wrappers(a=OptimWrapper(first), b=OptimWrapper(second)))
        return model

    # The second step uses the gradient that the first left, penalty included: 0.1 + 0.2.
    sign1, sign2 = signs()
    assert_gamma_differs_by(
        run(dict(rate=0.01)), run(None), 0.01 * 0.3 * sign1, 0.01 * 0.2 * sign2)


class Shared(nn.Module):

    def __init__(self):
        super().__init__()
        self.a = nn.BatchNorm2d(1)
        self.b = self.a
        self.c = nn.BatchNorm2d(1)
        self.c.weight = self.a.weight
        self.d = nn.Sequential(nn.Conv2d(1, 1, 1), nn.SyncBatchNorm(1))
        self.e = nn.BatchNorm2d(1, affine=False)
        self.f = nn.GroupNorm(1, 1)


@pytest.mark.parametrize('modules, exclude, names', [
    (None, None, 'a d.1'), (['d*'], None, 'd.1'), (['b'], None, 'a'), (None, ['c'], 'd.1'),
    (['a', 'd.?'], ['a'], 'd.1'), (['*'], [], 'a d.1')])
def test_which_layers(modules, exclude, names):
    model = Shared()
    found = select_scale_factors(model, modules, exclude).gammas
    expected = [model.get_submodule(name).weight for name in names.split()]
    assert [id(p) for p in found] == [id(p) for p in expected]


@pytest.mark.parametrize('arguments', [
    dict(modules=['*', 'head.*']), dict(exclude=['head.*']), dict(modules=['conv1', 'head.*'])])
def test_pattern_without_match(tmp_path, arguments):
    wanted = (arguments.get('modules') or arguments['exclude'])
    named = next(p for p in wanted if p != '*')
    runner = make_runner(tmp_path, arguments)
    with pytest.raises(UserError, match=re.escape(f'pattern {named!r} matches no')):
        runner.train()


def test_no_layer_left(tmp_path):
    with pytest.raises(UserError, match='no BatchNorm layer is left'):
        make_runner(tmp_path, dict(exclude=['*'])).train()


@pytest.mark.parametrize('wrong, message', [
    (dict(rate=-0.5), r'rate must be a number in \[0, 1e\+06\], but is -0.5'),
    (dict(rate=float('nan')), 'rate .* is nan'),
    (dict(near_zero_thr=-1), 'near_zero_thr .* is -1'),
    (dict(histogram_interval=-1), 'histogram_interval .* is -1'),
    (dict(log_interval=0), 'log_interval .* is 0'),
    (dict(modules='backbone.*'), "modules .* is 'backbone"),
    (dict(exclude=[1]), r'exclude .* is \[1\]'),
    (dict(schedule=dict(type='cubic')), "no sparsity schedule 'cubic'; mmgcp has .*mmgcp.cosine")])
def test_wrong_arguments(wrong, message):
    with pytest.raises(UserError, match=message):
        DynamicSparsityHook(**wrong)


def test_resumed_training_is_bit_for_bit_the_same(tmp_path):
    options = dict(
        hook=dict(rate=0.01, schedule=dict(type='two_phase')), iters=3, epochs=4,
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)))
    whole = trained(tmp_path, **options)
    # The second phase begins in the epoch after this one.
    resumed = make_runner(
        tmp_path, resume=True, load_from=str(tmp_path / 'epoch_1.pth'), **options)
    resumed.train()
    assert resumed.iter == 12
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_nothing_is_left_behind(tmp_path):
    runner = make_runner(tmp_path, dict(rate=0.01))
    hook = next(h for h in runner.hooks if isinstance(h, DynamicSparsityHook))
    gamma = runner.model.bn1.weight

    def change_by_a_step():
        before = gamma.detach().clone()
        gamma.grad = torch.zeros_like(gamma)
        runner.optim_wrapper.optimizer.step()
        return gamma.detach() - before

    runner.train()
    assert not change_by_a_step().any()
    # Starting twice without an end, as after an error, must not count twice.
    for _ in range(2):
        hook.before_train(runner)
    penalty = 0.1 * 0.01 * gamma.detach().sign()
    assert penalty.any()
    torch.testing.assert_close(change_by_a_step(), -penalty)
    hook.after_train(runner)
    assert not change_by_a_step().any()


def test_logs(tmp_path):
    model = TinyModel()
    for parameter in model.parameters():
        parameter.register_hook(torch.zeros_like)
    options = dict(rate=1e-1, near_zero_thr=0.3, log_interval=2)
    wrapper = dict(optimizer=dict(type='SGD', lr=0.0))
    runner = make_runner(tmp_path, options, model, iters=5, optim_wrapper=wrapper,
                         default_hooks=dict(logger=dict(type='LoggerHook', interval=2)))
    runner.train()
    magnitudes = np.abs(np.concatenate([
        layer.weight.detach().numpy() for layer in (model.bn1, model.bn2)]))
    expected = dict(
        sparsity_rate=0.1,
        sparsity_loss=0.1 * magnitudes.sum(),
        sparsity_near_zero=(magnitudes < 0.3).mean())
    printed = next(tmp_path.glob('*/*.log')).read_text()
    for name, value in expected.items():
        history = runner.message_hub.get_scalar(f'train/{name}').data[0]
        np.testing.assert_allclose(history, [value] * 3, rtol=1e-6)
        shown = re.findall(rf'Epoch\(train\).*{name}: (\S+)', printed)
        assert shown == [f'{value:.4f}'] * 2


def test_logged_rate_is_the_channels_mean(tmp_path):
    options = dict(rate=0.1, schedule=dict(type='two_phase', begin=0))
    runner = make_runner(tmp_path, options)
    runner.train()
    # Of five channels, those at the positions 3 and 4 of the order are spared.
    assert runner.message_hub.get_scalar('train/sparsity_rate').current() == pytest.approx(
        (3 * 0.1 + 2 * 0.001) / 5)


@pytest.mark.parametrize('interval, epochs', [(1, [1, 2, 3]), (2, [2]), (0, [])])
def test_histograms(tmp_path, interval, epochs):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    visualizer = dict(type='Visualizer', vis_backends=[
        dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')])
    make_runner(tmp_path, dict(histogram_interval=interval), epochs=3,
                visualizer=visualizer).train()
    images = sorted(tmp_path.glob('*/vis_data/vis_image/*.png'))
    assert [path.name for path in images] == [f'sparsity_gamma_histogram_{e}.png' for e in epochs]
    for path in images:
        assert cv2.imread(str(path)).shape == (480, 640, 3)
    folder = str(next(tmp_path.glob('*/vis_data')))
    events = EventAccumulator(folder, size_guidance=dict(histograms=0))
    events.Reload()
    if epochs:
        histograms = events.Histograms('sparsity/gamma')
        assert [event.step for event in histograms] == epochs
        assert {event.histogram_value.num for event in histograms} == {5}
    else:
        assert 'sparsity/gamma' not in events.Tags()['histograms']


def test_histogram_shows_the_values():
    values = np.concatenate([np.zeros(60), np.ones(40)]).astype('f4')
    image = draw_gamma_histogram(values, 1e-2, 'epoch 1')
    assert image.dtype == np.uint8 and image.shape == (480, 640, 3)
    blue = (image == [31, 119, 180]).all(-1).any(0)  # the columns with a bar
    bars = np.flatnonzero(np.diff(np.concatenate([[False], blue, [False]]).astype(int)))
    centres = bars.reshape(-1, 2).mean(1)
    assert centres[0] < 120 and centres[-1] > 540
    assert not blue[130:530].any()

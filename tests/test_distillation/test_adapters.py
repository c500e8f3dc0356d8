# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Adapters are trained beside the student and are no part of it."""
import copy
import uuid

import pytest
import torch
import torch.nn as nn
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import get_state_dict
from small_models import build
from test_training import assert_same, build_runner, find_ema_hook, read
from yolov4_samples import batch, yolov4

GROUPS = [
    dict(name='backbone', weight=1., layers='backbone_outputs',
         loss=dict(type='mmgcp.FeatureMimicLoss')),
    dict(name='neck', weight=1., layers=['neck.top_down_layers.1'],
         loss=dict(type='mmgcp.ChannelWiseLoss', tau=2.)),
    dict(name='stem', weight=10., layers=['backbone.stem']),
]
NAMES = [f'distill_adapters.{number}.weight' for number in range(4)]


@pytest.fixture(scope='module')
def config(teacher_files):
    return dict(type='mmgcp.SpatialAttentionDistiller', student=yolov4(), teacher=teacher_files,
                groups=GROUPS)


@pytest.fixture
def distiller(config):
    MessageHub.get_instance(uuid.uuid4().hex)
    return build(config)


def test_adapters_have_the_channels_of_both(distiller):
    # Stages 3, 4 and 5 have 256, 512 and 1024 channels at full width, the neck 128 there;
    # the student's width is 1/8, the teacher's 1/4.
    shapes = [tuple(adapter.weight.shape) for adapter in distiller.distill_adapters]
    assert shapes == [(64, 32, 1, 1), (128, 64, 1, 1), (256, 128, 1, 1), (32, 16, 1, 1)]


def test_only_trained_things_show_them(distiller):
    student = build(yolov4())
    names = [name for name, _ in student.named_parameters()]
    assert [name for name, _ in distiller.named_parameters()] == names + NAMES
    assert [name for name, _ in distiller.student.named_parameters()] == names
    assert list(distiller.state_dict()) == list(student.state_dict())
    assert list(get_state_dict(distiller)) == list(student.state_dict())  # mmengine's
    distiller.load_state_dict(student.state_dict(), strict=True)
    wrapped = nn.ModuleDict(dict(module=distiller))
    assert [name for name, _ in wrapped.named_parameters()][-4:] == [
        f'module.{name}' for name in NAMES]
    assert not any('adapter' in name for name in wrapped.state_dict())


def test_student_of_equal_width_has_none(config):
    distiller = build(dict(config, student=yolov4(widen_factor=0.25)))
    names = [name for name, _ in distiller.named_modules()]
    assert names == [name for name, _ in distiller.student.named_modules()]
    assert 'distill_adapters' not in dict(distiller.named_children())


def test_conversions_leave_them_outside(distiller):
    adapters = distiller.distill_adapters
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, revert_sync_batchnorm):
        convert(distiller)
        assert distiller.distill_adapters is adapters
        assert not any('adapter' in name for name, _ in distiller.student.named_modules())
    distiller.double()
    assert adapters[0].weight.dtype == distiller.backbone.stem.conv.weight.dtype == torch.double


def test_copies_have_their_own(distiller):
    copied = copy.deepcopy(distiller)
    for group in copied.groups:
        assert all(adapter in set(copied.distill_adapters) for adapter in group.adapters)
    assert not set(copied.distill_adapters) & set(distiller.distill_adapters)


@pytest.mark.parametrize('settings', [
    {},
    dict(paramwise_cfg=dict(custom_keys={'backbone.stem': dict(lr_mult=0.1)})),
    dict(constructor='YOLOv5OptimizerConstructor'),
    dict(constructor='YOLOv7OptimWrapperConstructor'),
])
def test_optimizers_have_each_of_them_once(distiller, settings):
    optimizer = dict(type='SGD', lr=0.01, weight_decay=1e-4, batch_size_per_gpu=2)
    if 'constructor' not in settings:
        optimizer.pop('batch_size_per_gpu')
    wrapper = build_optim_wrapper(
        distiller, dict(type='OptimWrapper', optimizer=optimizer, **copy.deepcopy(settings)))
    params = [id(param) for group in wrapper.param_groups for param in group['params']
              if isinstance(param, nn.Parameter)]  # not MMEngine's stand-in for an empty group
    assert len(params) == len(set(params))
    assert set(params) == {id(param) for param in distiller.parameters()}
    before = [adapter.weight.clone() for adapter in distiller.distill_adapters]
    distiller.train_step(batch(), wrapper)
    assert not any(map(torch.equal, before,
                       [adapter.weight for adapter in distiller.distill_adapters]))


def test_after_the_stop_epoch_they_still_have_gradients(config):
    distiller = build(dict(config, schedule=dict(stop_epoch=1)))
    hub = MessageHub.get_instance(uuid.uuid4().hex)
    hub.update_info_dict(dict(iter=5, max_iters=10, max_epochs=2))
    losses = distiller(**distiller.data_preprocessor(batch(), True), mode='loss')
    assert losses['loss_mimic_backbone'] == losses['loss_channel_neck'] == 0
    assert 'loss_attention_stem' not in losses
    sum(losses.values()).sum().backward()
    assert all((adapter.weight.grad == 0).all() for adapter in distiller.distill_adapters)


# ------------------------------- training -------------------------------


def runner_of(config, work_dir, hooks=('mmgcp.DistillAdapterHook', ), **kwargs):
    runner = build_runner(config, work_dir, **kwargs)
    for hook in hooks:
        runner.register_hook(dict(type=hook))
    return runner


@pytest.fixture(scope='module')
def trained(tmp_path_factory, config):
    runner = runner_of(config, tmp_path_factory.mktemp('adapters') / 'whole')
    runner.train()
    return runner


def test_checkpoint_is_one_of_the_student(trained):
    checkpoint = read(f'{trained.work_dir}/epoch_2.pth')
    student = build(yolov4())
    student.load_state_dict(checkpoint['state_dict'], strict=True)
    averaged = {key[len('module.'):]: value for key, value in checkpoint['ema_state_dict'].items()
                if key != 'steps'}
    student.load_state_dict(averaged, strict=True)
    assert_same(checkpoint['distill_adapters'], dict(trained.model.distill_adapters.state_dict()))
    assert find_ema_hook(trained).ema_model.module.distill_adapters is not (
        trained.model.distill_adapters)


def test_losses_are_logged(trained):
    for name in ('loss_mimic_backbone', 'loss_channel_neck', 'loss_attention_stem'):
        assert len(trained.message_hub.log_scalars[f'train/{name}'].data[0]) == 4


def test_resumed_training_is_the_same_to_the_bit(trained, config, tmp_path):
    runner = runner_of(config, tmp_path / 'resumed', resume=True,
                       load_from=f'{trained.work_dir}/epoch_1.pth')
    runner.train()
    whole, resumed = (read(f'{path}/epoch_2.pth') for path in (trained.work_dir, runner.work_dir))
    first = read(f'{trained.work_dir}/epoch_1.pth')
    assert not torch.equal(first['distill_adapters']['0.weight'],
                           whole['distill_adapters']['0.weight'])
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'distill_adapters'):
        assert_same(resumed[key], whole[key], key)


def test_resumed_without_the_hook_they_begin_anew(trained, config, tmp_path):
    runner = runner_of(config, tmp_path / 'resumed', hooks=(), resume=True,
                       load_from=f'{trained.work_dir}/epoch_1.pth')
    with pytest.warns(UserWarning, match='resumes at iteration 2, but with new adapters'):
        runner.train()
    assert 'distill_adapters' not in read(f'{runner.work_dir}/epoch_2.pth')


def test_another_training_does_not_take_them(trained, config, tmp_path):
    runner = runner_of(config, tmp_path / 'other', load_from=f'{trained.work_dir}/epoch_1.pth')
    before = copy.deepcopy(runner.model.distill_adapters.state_dict())
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert_same(dict(runner.model.distill_adapters.state_dict()), dict(before))

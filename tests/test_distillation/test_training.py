# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Train a distiller with MMEngine's runner, as MMYOLO's tools/train.py does."""
import copy
from operator import itemgetter

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from small_models import GROUPS, build
from torch.utils.data import DataLoader
from yolov4_samples import batch, yolov4


def distiller_config(teacher):
    return dict(
        type='mmgcp.SpatialAttentionDistiller', student=yolov4(), teacher=teacher, groups=GROUPS)


def build_runner(model, work_dir, **kwargs):
    return Runner(
        model=ConfigDict(copy.deepcopy(model)),
        work_dir=str(work_dir),
        train_dataloader=DataLoader([batch(0), batch(1)], collate_fn=itemgetter(0)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(
            type='SGD', lr=0.01, momentum=0.9, nesterov=True)),
        param_scheduler=dict(type='MultiStepLR', milestones=[1]),
        custom_hooks=[
            dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, gamma=2,
                 update_buffers=True, strict_load=False, priority=49)
        ],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        default_scope='mmyolo',
        log_level='ERROR',
        randomness=dict(seed=0),
        experiment_name=f'{work_dir.parent.name}_{work_dir.name}',
        **kwargs)


def find_ema_hook(runner):
    return next(hook for hook in runner.hooks if isinstance(hook, EMAHook))


def read(path):
    return torch.load(path, weights_only=False)


def assert_same(a, b, name='checkpoint'):
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict):
        assert list(a) == list(b), name
        for key in a:
            assert_same(a[key], b[key], f'{name}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f'{name}.{i}')
    else:
        assert a == b, name


@pytest.fixture(scope='module')
def trained(tmp_path_factory, teacher_files):
    """A runner after two epochs."""
    runner = build_runner(
        distiller_config(teacher_files), tmp_path_factory.mktemp('trained') / 'whole')
    runner.train()
    return runner


def test_losses_are_logged(trained):
    scalars = trained.message_hub.log_scalars
    for name in ('loss', 'loss_obj', 'loss_attention_backbone', 'loss_attention_head'):
        assert len(scalars[f'train/{name}'].data[0]) == 4


def test_checkpoint_is_one_of_the_student(trained):
    checkpoint = read(f'{trained.work_dir}/epoch_2.pth')
    student = build(yolov4())
    student.load_state_dict(checkpoint['state_dict'], strict=True)
    ema = find_ema_hook(trained)
    assert_same(dict(student.state_dict()), dict(ema.ema_model.module.student.state_dict()))
    raw = {key[len('module.'):]: value for key, value in checkpoint['ema_state_dict'].items()
           if key != 'steps'}
    student.load_state_dict(raw, strict=True)
    assert_same(dict(student.state_dict()), dict(trained.model.student.state_dict()))
    assert not torch.equal(raw['backbone.stem.conv.weight'],
                           checkpoint['state_dict']['backbone.stem.conv.weight'])
    load_checkpoint(student, f'{trained.work_dir}/epoch_2.pth', strict=True)


def test_only_the_student_is_trained(trained, teacher_files):
    params = [p for group in trained.optim_wrapper.param_groups for p in group['params']]
    assert {id(p) for p in params} == {id(p) for p in trained.model.student.parameters()}
    weights = read(teacher_files['checkpoint'])['state_dict']
    assert_same(dict(trained.model.teacher.state_dict()), dict(weights))


def test_average_shares_the_teacher(trained):
    ema = find_ema_hook(trained)
    assert ema.ema_model.module.teacher is trained.model.teacher


def test_resumed_training_is_the_same_to_the_bit(trained, teacher_files, tmp_path):
    runner = build_runner(
        distiller_config(teacher_files), tmp_path / 'resumed',
        load_from=f'{trained.work_dir}/epoch_1.pth', resume=True)
    runner.train()
    assert runner.epoch == 2
    whole, resumed = (read(f'{path}/epoch_2.pth') for path in (trained.work_dir, runner.work_dir))
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        assert_same(resumed[key], whole[key], key)


def test_start_from_a_checkpoint_of_the_student(teacher_files, tmp_path):
    student = build(yolov4(), seed=5)
    torch.save(dict(state_dict=student.state_dict(), meta={}), tmp_path / 'pruned.pth')
    runner = build_runner(
        distiller_config(teacher_files), tmp_path / 'run', load_from=str(tmp_path / 'pruned.pth'))
    runner.call_hook('before_run')
    runner.load_or_resume()
    assert_same(dict(runner.model.state_dict()), dict(student.state_dict()))

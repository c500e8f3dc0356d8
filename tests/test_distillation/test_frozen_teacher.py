# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from small_models import build
from yolov4_samples import yolov4

from mmgcp.distillation import FrozenTeacher
from mmgcp.errors import UserError
from mmgcp.registry import MODELS


def features_of(teacher, images, name):
    teacher.record_features([name])
    features, _ = teacher.run(images)
    assert list(features) == [name]
    return features[name]


def test_has_the_weights_of_the_checkpoint(teacher_files):
    teacher = FrozenTeacher(**teacher_files)
    weights = torch.load(teacher_files['checkpoint'], weights_only=True)['state_dict']
    state = teacher.module.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[key], weights[key]) for key in state)


def test_is_frozen(teacher_files):
    teacher = FrozenTeacher(**teacher_files)
    assert not any(module.training for module in teacher.module.modules())
    assert not any(param.requires_grad for param in teacher.module.parameters())
    feature = features_of(teacher, torch.rand(1, 3, 64, 64), 'backbone.stage1')
    assert feature.shape == (1, 16, 32, 32)
    assert not feature.requires_grad
    assert copy.deepcopy(teacher) is teacher


def test_run_of_the_head(teacher_files):
    teacher, images = FrozenTeacher(**teacher_files), torch.rand(1, 3, 64, 64)
    assert teacher.run(images)[1] is None
    layer = 'bbox_head.head_module.convs_bridge.1'
    teacher.record_head([layer])
    head = teacher.run(images)[1]
    features = teacher.module.extract_feat(images)
    assert all(map(torch.equal, head.features, features))
    read, = head.layer_inputs[layer]
    assert torch.equal(read, features[1]) and not read.requires_grad
    outputs = teacher.module(images, mode='tensor')
    assert all(torch.equal(a, b) for mine, theirs in zip(head.outputs, outputs)
               for a, b in zip(mine, theirs))

    read = torch.full_like(read, 100.).requires_grad_()
    repeated = head.repeat({layer: [read]})
    # Only the level of the replaced input changes: three anchors at 8 x 8, 4 x 4 and 2 x 2 cells
    changed = (repeated.scores != head.responses.scores).any(-1).flatten()
    assert not changed[:192].any() and changed[192:240].all() and not changed[240:].any()
    repeated.scores.sum().backward()
    assert read.grad.abs().sum() > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in teacher.module.modules())


def test_follows_the_batch_to_its_device(teacher_files):
    teacher = FrozenTeacher(**teacher_files)
    images = torch.rand(1, 3, 64, 64, device='meta')
    feature = features_of(teacher, images, 'backbone.stage1')
    assert feature.device == next(teacher.module.parameters()).device == images.device


def test_keeps_its_precision(teacher_files):
    teacher = FrozenTeacher(**teacher_files)
    images = torch.rand(1, 3, 64, 64)
    feature = features_of(teacher, images.double(), 'backbone.stage1')
    assert torch.equal(feature, features_of(teacher, images, 'backbone.stage1'))


@pytest.mark.parametrize('wrap', [dict, Config, lambda model: model['model']])
def test_config_without_a_file(teacher_files, wrap):
    config = wrap(dict(model=yolov4(widen_factor=0.25)))
    untouched = copy.deepcopy(config)
    FrozenTeacher(config, teacher_files['checkpoint'])
    assert config == untouched or config.to_dict() == untouched.to_dict()


def test_config_file_of_another_scope(tmp_path):
    model = dict(  # MMYOLO's scope has none of these types
        type='RetinaNet',
        backbone=dict(type='MobileNetV2', widen_factor=0.125, out_indices=(0, )),
        neck=None,
        bbox_head=dict(
            type='RetinaHead', num_classes=1, in_channels=8, stacked_convs=0, feat_channels=8))
    Config(dict(default_scope='mmdet', model=model)).dump(tmp_path / 'a.py')
    state = MODELS.build(dict(model, _scope_='mmdet')).state_dict()
    torch.save(state, tmp_path / 'a.pth')
    teacher = FrozenTeacher(tmp_path / 'a.py', tmp_path / 'a.pth')
    assert type(teacher.module).__name__ == 'RetinaNet'


def test_init_cfg_is_not_followed(teacher_files):
    config = yolov4(widen_factor=0.25)
    config['init_cfg'] = dict(type='Pretrained', checkpoint='https://nowhere.invalid/a.pth')
    config['backbone']['init_cfg'] = config['init_cfg']
    FrozenTeacher(config, teacher_files['checkpoint'])


def test_synchronised_normalisation_runs_on_a_cpu(teacher_files):
    config = yolov4(widen_factor=0.25)
    for part in (config['backbone'], config['neck'], config['bbox_head']['head_module']):
        part['norm_cfg'] = dict(type='SyncBN', momentum=0.03, eps=0.001)
    teacher = FrozenTeacher(config, teacher_files['checkpoint'])
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in teacher.module.modules())
    images = torch.rand(1, 3, 64, 64)
    feature = features_of(teacher, images, 'backbone.stage2')
    expected = features_of(FrozenTeacher(**teacher_files), images, 'backbone.stage2')
    assert torch.equal(feature, expected)


@pytest.mark.parametrize('change', [
    lambda state: dict(state),  # without the key 'state_dict'
    lambda state: dict(state_dict={f'module.{key}': value for key, value in state.items()}),
    lambda state: dict(state_dict={key: value for key, value in state.items()
                                   if not key.endswith('num_batches_tracked')}),
])
def test_other_forms_of_checkpoints(teacher_files, tmp_path, change):
    state = torch.load(teacher_files['checkpoint'], weights_only=True)['state_dict']
    torch.save(change(state), tmp_path / 'a.pth')
    teacher = FrozenTeacher(teacher_files['config'], tmp_path / 'a.pth')
    assert all(torch.equal(value, state[key]) for key, value in teacher.module.state_dict().items()
               if 'tracked' not in key)


def test_missing_files(teacher_files):
    with pytest.raises(UserError, match='there is no config nowhere.py'):
        FrozenTeacher('nowhere.py', teacher_files['checkpoint'])
    with pytest.raises(UserError, match='there is no checkpoint a.pth'):
        FrozenTeacher(teacher_files['config'], 'a.pth')


def test_config_without_model(teacher_files):
    with pytest.raises(UserError, match="the teacher's config describes no model"):
        FrozenTeacher(dict(work_dir='x'), teacher_files['checkpoint'])


def test_checkpoint_of_another_width(teacher_files):
    message = (r"teacher.pth does not fit the teacher's config: \d+ mismatched "
               r'\(backbone.stage1.0.conv.weight, [^,]+, [^,]+, ...\)$')
    with pytest.raises(UserError, match=message):
        FrozenTeacher(yolov4(widen_factor=0.125), teacher_files['checkpoint'])


def test_checkpoint_with_missing_and_unexpected_keys(teacher_files, tmp_path):
    state = build(yolov4()).state_dict()
    state['extra'] = state.pop('backbone.stem.conv.weight')
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'1 missing \(backbone.stem.conv.weight\); '
                                         r'1 unexpected \(extra\)$'):
        FrozenTeacher(yolov4(), tmp_path / 'a.pth')

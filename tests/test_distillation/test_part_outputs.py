# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from mmengine.model import BaseModel
from small_models import build
from yolov4_samples import yolov4

from mmgcp.distillation import find_part_outputs, spatial_attention
from mmgcp.errors import UserError
from mmgcp.registry import MODELS


class Backbone(nn.Module):
    """Stages of some kinds, the third of which shares its activation with the second."""

    def __init__(self):
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True))
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.conv3 = nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU()
        self.conv4, self.bn4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.act4 = nn.ReLU(inplace=True)
        self.out4 = nn.Identity()

    def forward(self, x):
        one = self.stage1(x)
        two = self.act(self.conv2(one))
        three = self.act(self.conv3(two))
        four = self.out4(self.act4(self.bn4(self.conv4(three))))
        return one, two, three, four, self.conv2.weight.mean() + four


class Neck(nn.Module):

    def __init__(self):
        super().__init__()
        self.smooth = nn.Conv2d(4, 4, 1)
        self.out = nn.Identity()

    def forward(self, x):
        return self.smooth(x[0]), self.out(x[1]), x[2]


class MaxNeck(nn.Module):

    def forward(self, x):
        return torch.max(x[0], x[1])


class Model(BaseModel):

    def __init__(self):
        super().__init__()
        self.backbone, self.neck, self.single = Backbone(), Neck(), None

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.neck(self.backbone(inputs))


def test_backbone():
    # the whole stage, neither of two uses, the last before the identity, no addition
    assert find_part_outputs(Model(), 'backbone') == [
        'backbone.stage1', None, None, 'backbone.act4', None]


def test_neck():
    # an identity is better than nothing; what is handed through is not the neck's
    assert find_part_outputs(Model(), 'neck') == ['neck.smooth', 'neck.out', None]


def test_part_of_one_output():
    model = Model()
    model.neck = MaxNeck()
    assert find_part_outputs(model, 'neck') == ['neck']


def test_missing_part():
    with pytest.raises(UserError, match='the teacher has no single'):
        find_part_outputs(Model(), 'single', 'teacher')


def test_model_is_left_as_it_is():
    model = build(yolov4())
    before = copy.deepcopy(model.state_dict())
    find_part_outputs(model, 'neck')
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


# What YOLOv4's backbone and neck return, by their code
BACKBONE = ['backbone.stage3', 'backbone.stage4', 'backbone.stage5']
NECK = ['neck.top_down_layers.1', 'neck.bottom_up_layers.0', 'neck.bottom_up_layers.1']


def test_derived_groups_of_yolov4(distiller_config):
    distiller_config.pop('groups')
    distiller = build(distiller_config)
    assert {group.name: group.layers for group in distiller.groups} == dict(
        backbone=[(name, name) for name in BACKBONE], neck=[(name, name) for name in NECK])
    images = torch.rand(2, 3, 64, 64)
    losses = distiller(images, _samples(), mode='loss')
    distiller.eval()
    distiller.student.train()
    student = distiller.student.backbone(images), None
    student = student[0], distiller.student.neck(student[0])
    with torch.no_grad():
        teacher = distiller.teacher.backbone(images), None
        teacher = teacher[0], distiller.teacher.neck(teacher[0])
    for name, weight, outputs, targets in zip(('backbone', 'neck'), (1e2, 1.), student, teacher):
        expected = weight * sum(
            (spatial_attention(output) - spatial_attention(target)).square().mean()
            for output, target in zip(outputs, targets))
        torch.testing.assert_close(losses[f'loss_attention_{name}'], expected)


def _samples():
    return dict(bboxes_labels=torch.tensor([[0., 1, 4, 4, 40, 40]]), img_metas=[{}, {}])


def test_derived_layers_in_a_group_of_ones_own(distiller_config):
    distiller_config['groups'] = [
        dict(name='a', weight=1., layers='neck_outputs',
             loss=dict(type='mmgcp.ChannelWiseLoss')),
        dict(name='b', weight=1., layers=['backbone.stage1'])]
    distiller = build(distiller_config)
    assert [pair[0] for pair in distiller.groups[0].layers] == NECK
    losses = distiller(torch.rand(2, 3, 64, 64), _samples(), mode='loss')
    assert {name for name in losses if name.split('_')[-1] in 'ab'} == {
        'loss_channel_a', 'loss_attention_b'}


def test_detectors_without_a_neck(distiller_config, tmp_path):
    student = dict(
        _scope_='mmdet', type='RetinaNet',
        backbone=dict(type='MobileNetV2', widen_factor=0.125, out_indices=(0, 1)),
        neck=None,
        bbox_head=dict(type='RetinaHead', num_classes=1, in_channels=8, stacked_convs=0,
                       feat_channels=8))
    torch.save(MODELS.build(copy.deepcopy(student)).state_dict(), tmp_path / 'a.pth')
    distiller_config.update(
        student=student, teacher=dict(config=copy.deepcopy(student),
                                      checkpoint=str(tmp_path / 'a.pth')))
    distiller_config.pop('groups')
    distiller = build(distiller_config)
    assert [(group.name, group.layers) for group in distiller.groups] == [
        ('backbone', [('backbone.layer1', ) * 2, ('backbone.layer2', ) * 2])]
    distiller_config['groups'] = [dict(name='neck', weight=1., layers='neck_outputs')]
    with pytest.raises(UserError, match='the student has no neck'):
        build(distiller_config)


def test_different_numbers_of_outputs(distiller_config):
    distiller_config['student']['backbone']['out_indices'] = (2, 3, 4, 5)
    distiller_config['groups'] = [dict(name='a', weight=1., layers='backbone_outputs')]
    distiller_config['student']['neck'] = None
    with pytest.raises(UserError, match='backbones .* same outputs, but have 4 and 3'):
        build(distiller_config)


@pytest.mark.parametrize('groups, message', [
    ('all', "groups must be 'auto' or a list of groups, but is 'all'"),
    ([dict(name='a', weight=1., layers='head_outputs')],
     "must be a list of names or one of .*neck_outputs.*, but they are 'head_outputs'"),
    ([dict(name='a', weight=1., layers=['neck'], tau=1)],
     r"may have 'loss', but has \['layers', 'name', 'tau', 'weight'\]"),
])
def test_wrong_groups(distiller_config, groups, message):
    distiller_config['groups'] = groups
    with pytest.raises(UserError, match=message):
        MODELS.build(distiller_config)

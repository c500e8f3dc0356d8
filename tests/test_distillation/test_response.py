# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from small_models import build
from torch.distributions import Bernoulli, kl_divergence
from yolov4_samples import batch, yolov4

from mmgcp.distillation import ResponseLoss
from mmgcp.distillation.response_loss import binary_kl_divergence
from mmgcp.distillation.responses import Responses, read_responses
from mmgcp.errors import UserError
from mmgcp.registry import MODELS


def responses(seed=0, objectness=True, num_classes=4, size=6):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    corners = normal(2, size, 2) * 4
    boxes = torch.cat((corners, corners + 8 + normal(2, size, 2).abs() * 8), -1)
    return Responses(normal(2, size, num_classes), boxes,
                     normal(2, size) if objectness else None,
                     torch.tensor([8., 8., 8., 8., 16., 16.]))


def giou_by_hand(a, b):
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a, b
    intersection = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return intersection / union - (hull - union) / hull


# ------------------------------ divergence ------------------------------


def test_divergence_by_hand():
    # sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2
    value = binary_kl_divergence(torch.zeros(1), torch.tensor([3.]).log())
    assert value.item() == pytest.approx(
        0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5), rel=1e-5)


@pytest.mark.parametrize('temperature', [1., 3.])
def test_divergence_is_that_of_distributions(temperature):
    student, teacher = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).chunk(2, 1)
    expected = kl_divergence(Bernoulli(logits=teacher / temperature),
                             Bernoulli(logits=student / temperature))
    torch.testing.assert_close(binary_kl_divergence(student, teacher, temperature),
                               temperature**2 * expected, atol=1e-5, rtol=1e-4)


def test_divergence_of_extreme_scores_is_finite():
    student = torch.tensor([-200., 200.], requires_grad=True)
    value = binary_kl_divergence(student, torch.tensor([200., 200.])).sum()
    value.backward()
    assert value.item() == pytest.approx(200) and torch.isfinite(student.grad).all()


# --------------------------------- loss ---------------------------------


def test_parts_with_objectness():
    student, teacher = responses(0), responses(1)
    confidences = (teacher.scores.sigmoid().numpy().max(-1) * teacher.objectnesses.sigmoid(
    ).numpy())
    threshold = float(np.median(confidences))
    losses = ResponseLoss(temperature=3., weights=dict(box=5.), score_thr=threshold)(
        student, teacher)
    positives = [(n, p) for n in range(2) for p in range(6) if confidences[n, p] > threshold]
    assert 0 < len(positives) < 12
    classes = [9 * kl_divergence(Bernoulli(logits=teacher.scores[at] / 3),
                                 Bernoulli(logits=student.scores[at] / 3)).sum().item()
               for at in positives]
    objectness = 9 * kl_divergence(Bernoulli(logits=teacher.objectnesses / 3),
                                   Bernoulli(logits=student.objectnesses / 3)).mean().item()
    boxes = [1 - giou_by_hand(student.boxes[at].tolist(), teacher.boxes[at].tolist())
             for at in positives]
    assert {name: value.item() for name, value in losses.items()} == dict(
        loss_response_cls=pytest.approx(np.mean(classes), rel=1e-3),
        loss_response_obj=pytest.approx(objectness, rel=1e-3),
        loss_response_box=pytest.approx(5 * np.mean(boxes), rel=1e-4))


def test_without_objectness_the_classes_of_all_predictions_count():
    student, teacher = responses(0, False), responses(1, False)
    losses = ResponseLoss(temperature=2., score_thr=0.9)(student, teacher)
    expected = 4 * kl_divergence(Bernoulli(logits=teacher.scores / 2),
                                 Bernoulli(logits=student.scores / 2)).sum(-1).mean()
    assert set(losses) == {'loss_response_cls', 'loss_response_box'}
    assert losses['loss_response_cls'].item() == pytest.approx(expected.item(), rel=1e-3)


def test_squared_difference_is_in_units_of_the_stride():
    student, teacher = responses(0), responses(0)
    student.boxes = teacher.boxes + torch.tensor([8., 0., 0., 0.])
    loss = ResponseLoss(box_loss='l2', score_thr=0.)(student, teacher)['loss_response_box']
    # One of four corners is off by 1 (stride 8, four predictions) or 1/2 (stride 16, two)
    assert loss.item() == pytest.approx((4 * 1 + 2 * 0.25) / 6 / 4)


def test_overlap_without_the_hull():
    student, teacher = responses(0), responses(0)
    teacher.boxes = torch.tensor([0., 0., 10., 10.]).expand(2, 6, 4)
    student.boxes = torch.tensor([0., 0., 5., 10.]).expand(2, 6, 4)
    loss = ResponseLoss(box_loss='iou', score_thr=0.)(student, teacher)['loss_response_box']
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize('box_loss, expected', [('iou', 1.), ('giou', 1 + 30 / 40)])
def test_box_that_ends_before_it_begins_counts_as_empty(box_loss, expected):
    student, teacher = responses(0), responses(0)
    teacher.boxes = torch.tensor([0., 0., 10., 1.]).expand(2, 6, 4)
    student.boxes = torch.tensor([40., 0., 35., 1.]).expand(2, 6, 4)
    loss = ResponseLoss(box_loss=box_loss, score_thr=0.)(student, teacher)['loss_response_box']
    assert loss.item() == pytest.approx(expected)  # a hull of 40 around 10


@pytest.mark.parametrize('box_loss', ['iou', 'giou', 'l2'])
@pytest.mark.parametrize('objectness', [True, False])
def test_zero_when_equal(box_loss, objectness):
    losses = ResponseLoss(box_loss=box_loss, score_thr=0.)(
        responses(0, objectness), responses(0, objectness))
    for value in losses.values():
        assert value.item() == pytest.approx(0, abs=1e-5)


def test_no_positives():
    student, teacher = responses(0), responses(1)
    losses = ResponseLoss(score_thr=1.)(student, teacher)
    assert losses['loss_response_cls'] == losses['loss_response_box'] == 0
    assert losses['loss_response_obj'] > 0


def test_part_of_no_weight_is_left_out():
    losses = ResponseLoss(weights=dict(box=0.))(responses(0), responses(1))
    assert set(losses) == {'loss_response_cls', 'loss_response_obj'}


@pytest.mark.parametrize('settings, message', [
    (dict(temperature=0), 'temperature must be .* but is 0'),
    (dict(box_loss='ciou'), "box_loss must be one of .* but is 'ciou'"),
    (dict(weights=dict(boxes=1.)), r"but has \['boxes'\]"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(type='mmgcp.ResponseLoss', **settings))


@pytest.mark.parametrize('other, message', [
    (dict(num_classes=5), r'are \(2, 6, 4\) and \(2, 6, 5\)'),
    (dict(objectness=False), 'both have objectnesses or both have none'),
])
def test_different_heads(other, message):
    with pytest.raises(UserError, match=message):
        ResponseLoss()(responses(0), responses(1, **other))


# ------------------------------- the heads -------------------------------


def test_responses_are_what_the_head_predicts():
    model = build(yolov4()).eval()
    head = model.bbox_head
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, 64, 64), mode='tensor')
    read = read_responses(head, outputs)
    assert read.scores.shape == (2, 3 * (64 + 16 + 4), 3)
    assert read.strides.tolist() == [8.] * 192 + [16.] * 48 + [32.] * 12
    metas = [dict(ori_shape=(64, 64), scale_factor=(1., 1.))] * 2
    cfg = copy.deepcopy(head.test_cfg)
    cfg.update(score_thr=-1, nms_pre=10000, multi_label=False)
    results = head.predict_by_feat(*outputs, batch_img_metas=metas, cfg=cfg, rescale=False,
                                   with_nms=False)
    for image, result in enumerate(results):
        assert isinstance(result, InstanceData) and len(result) == 252
        order = read.confidences[image].argsort(descending=True)
        torch.testing.assert_close(read.confidences[image][order], result.scores)
        ends = [0, 100, 251]  # scores tie nowhere there
        torch.testing.assert_close(read.boxes[image][order][ends].clamp(0, 64),
                                   result.bboxes[ends].clamp(0, 64), rtol=0, atol=1e-3)


def test_student_runs_once_and_its_training_outputs_are_compared(distiller_config):
    distiller_config.update(
        groups=[], response=dict(type='mmgcp.ResponseLoss', score_thr=0.))
    distiller = build(distiller_config)
    runs = []
    distiller.student.backbone.register_forward_hook(lambda *args: runs.append('student'))
    distiller.teacher.backbone.register_forward_hook(lambda *args: runs.append('teacher'))
    data = distiller.data_preprocessor(batch(), True)
    losses = distiller(**data, mode='loss')
    assert sorted(runs) == ['student', 'teacher']
    assert not distiller.student.bbox_head._forward_hooks

    student = copy.deepcopy(distiller.student)  # in training mode, too
    response, = distiller.responses
    expected = response(
        read_responses(student.bbox_head, student(data['inputs'], mode='tensor')),
        read_responses(distiller.teacher.bbox_head,
                       distiller.teacher(data['inputs'], mode='tensor')))
    assert len(expected) == 3
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)

    sum(losses[name] for name in expected).backward()
    assert distiller.bbox_head.head_module.convs_pred[2].weight.grad.abs().sum() > 0
    assert distiller.backbone.stem.conv.weight.grad.abs().sum() > 0
    assert all(param.grad is None for param in distiller.teacher.parameters())


def test_response_of_the_teacher_itself_is_zero(distiller_config):
    distiller_config.update(
        student=yolov4(widen_factor=0.25), groups=[],
        response=dict(type='mmgcp.ResponseLoss', score_thr=0.))
    distiller = build(distiller_config)
    distiller.load_state_dict(distiller.teacher.state_dict())
    distiller.eval()
    losses = distiller(**distiller.data_preprocessor(batch(), True), mode='loss')
    for part in ('cls', 'obj', 'box'):
        assert losses[f'loss_response_{part}'].item() == pytest.approx(0, abs=1e-5)


def test_head_of_another_library(distiller_config):
    model = dict(
        _scope_='mmdet', type='RetinaNet',
        backbone=dict(type='MobileNetV2', widen_factor=0.125, out_indices=(0, )),
        neck=None,
        bbox_head=dict(type='RetinaHead', num_classes=1, in_channels=8, stacked_convs=0,
                       feat_channels=8))
    distiller_config.update(
        student=model, groups=[], response=dict(type='mmgcp.ResponseLoss'))
    with pytest.raises(UserError, match="head of the student is a RetinaHead"):
        MODELS.build(distiller_config)

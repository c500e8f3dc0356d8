# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import uuid

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub
from older_stacks import needs_cpu_autocast
from small_heads import (
    WITH_EDGES,
    batch_for,
    config_of,
    disturb_head,
    images,
    trained_detector,
)
from small_models import build
from tiers import slow_except
from torch.distributions import Categorical, kl_divergence
from yolov4_samples import yolov4

from mmgcp.distillation import LocalizationLoss
from mmgcp.distillation.localization_loss import edge_divergence
from mmgcp.distillation.responses import Responses, read_responses, show_distributions
from mmgcp.errors import UserError
from mmgcp.registry import MODELS


def responses(seed=0, size=40, distances=5):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, size, 3, generator=generator) * 3 - 3
    return Responses(scores, torch.zeros(2, size, 4), None, torch.ones(size),
                     torch.randn(2, size, 4, distances, generator=generator))


# ------------------------------ divergence ------------------------------


def test_divergence_by_hand():
    # Distances 0 and 1: teacher (3/4, 1/4), student (1/2, 1/2) at one edge of four, else equal
    teacher = torch.zeros(4, 2)
    teacher[2, 0] = np.log(3)
    expected = (0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)) / 4
    assert edge_divergence(torch.zeros(4, 2), teacher).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('temperature', [1., 10.])
def test_divergence_is_that_of_distributions(temperature):
    student, teacher = responses(0).edges.double(), responses(1).edges.double()
    expected = temperature**2 * kl_divergence(
        Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    assert expected.shape == (2, 40, 4)
    torch.testing.assert_close(edge_divergence(student, teacher, temperature), expected.mean(-1))


# --------------------------------- loss ---------------------------------


def test_regions_by_hand():
    student, teacher = responses(0), responses(1)
    losses = LocalizationLoss(temperature=4., weights=dict(valuable=0.5), score_thr=0.4,
                              valuable_ratio=0.5)(student, teacher)
    confidences = 1 / (1 + np.exp(-teacher.scores.numpy().max(-1)))
    regions = dict(main=confidences > 0.4, valuable=(confidences > 0.2) & (confidences <= 0.4))
    values = {}
    for name, region in regions.items():
        assert 4 < region.sum() < 60
        values[name] = np.mean([
            16 * kl_divergence(Categorical(logits=teacher.edges[at] / 4),
                               Categorical(logits=student.edges[at] / 4)).mean().item()
            for at in zip(*np.nonzero(region))])
    assert {name: value.item() for name, value in losses.items()} == dict(
        loss_localization_main=pytest.approx(values['main'], rel=1e-4),
        loss_localization_valuable=pytest.approx(0.5 * values['valuable'], rel=1e-4))


def test_only_the_edges_have_gradients():
    student, teacher = responses(0), responses(1)
    for value in (student.edges, student.scores, teacher.edges, teacher.scores):
        value.requires_grad_()
    with torch.no_grad():  # as the teacher runs
        teacher = copy.copy(teacher)
        teacher.edges, teacher.scores = teacher.edges.clone(), teacher.scores.clone()
    sum(LocalizationLoss()(student, teacher).values()).backward()
    assert student.edges.grad.abs().sum() > 0 and student.scores.grad is None


def test_empty_regions():
    losses = LocalizationLoss(score_thr=1.)(responses(0), responses(1))
    assert losses['loss_localization_main'] == 0 < losses['loss_localization_valuable']
    losses = LocalizationLoss(valuable_ratio=1.)(responses(0), responses(1))
    assert losses['loss_localization_main'] > 0 == losses['loss_localization_valuable']


def test_zero_when_equal():
    losses = LocalizationLoss()(responses(0), responses(0))
    assert all(value.item() == pytest.approx(0, abs=1e-5) for value in losses.values())


def test_region_of_no_weight_is_left_out():
    assert set(LocalizationLoss(weights=dict(valuable=0))(responses(0), responses(1))) == {
        'loss_localization_main'}


@pytest.mark.parametrize('settings, message', [
    (dict(temperature=0), 'temperature must be .* but is 0'),
    (dict(valuable_ratio=2), r'valuable_ratio must be a number in \[0, 1\], but is 2'),
    (dict(weights=dict(box=1)), r"may have the keys 'main' and 'valuable', but has \['box'\]"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(type='mmgcp.LocalizationLoss', **settings))


# ------------------------------- the heads -------------------------------


@pytest.fixture(params=slow_except(['yolov8', 'gfl'], WITH_EDGES))
def teacher(request):
    """The config of a detector and the detector."""
    config = config_of(request.param)
    return config, trained_detector(config)


def test_distributions_are_those_of_the_boxes(teacher):
    """Their means, in units of the stride, are the distances of the box from the prediction."""
    _, model = teacher
    show_distributions(model)
    with torch.no_grad():
        found = read_responses(model.bbox_head, model(images(), mode='tensor'))
    count = found.edges.shape[-1]
    assert found.edges.shape == (*found.scores.shape[:2], 4, count)
    means = (found.edges.softmax(-1) * torch.arange(count)).sum(-1) * found.strides[:, None]
    left, top, right, bottom = means.unbind(-1)
    sizes = torch.stack((left + right, top + bottom), -1)
    torch.testing.assert_close(found.boxes[..., 2:] - found.boxes[..., :2], sizes, rtol=1e-4,
                               atol=1e-3)
    places = found.boxes[..., :2] + torch.stack((left, top), -1)
    assert len(places[0].unique(dim=0)) > 20
    torch.testing.assert_close(places[0], places[1], rtol=0, atol=1e-3)
    assert found.edges.std(1).min() > 0


def test_only_the_head_module_says_that_it_is_in_training_mode(teacher):
    config, model = teacher
    with torch.no_grad():
        before = read_responses(model.bbox_head, model(images(), mode='tensor'))
        show_distributions(model)
        after = read_responses(model.bbox_head, model(images(), mode='tensor'))
    assert torch.equal(before.scores, after.scores) and torch.equal(before.boxes, after.boxes)
    training = [name for name, module in model.named_modules() if module.training]
    assert training == (['bbox_head.head_module'] if config.default_scope == 'mmyolo' else [])


def test_boxes_of_gfl_are_those_that_it_predicts():
    model = trained_detector(config_of('gfl'))
    with torch.no_grad():
        outputs = model(images(), mode='tensor')
    found = read_responses(model.bbox_head, outputs)
    metas = [dict(img_shape=(10**6, 10**6), scale_factor=(1., 1.))] * 2
    cfg = copy.deepcopy(model.test_cfg)
    cfg.update(score_thr=-1, nms_pre=10**6)
    results = model.bbox_head.predict_by_feat(*outputs, batch_img_metas=metas, cfg=cfg,
                                              rescale=False, with_nms=False)
    for image, result in enumerate(results):
        scores, order = found.scores[image].sigmoid().flatten().sort(descending=True)
        torch.testing.assert_close(result.scores.sort(descending=True).values, scores)
        best = found.boxes[image][order[0] // 3].clamp(min=0)
        torch.testing.assert_close(result.bboxes[result.scores.argmax()], best, rtol=0, atol=1e-3)


# ------------------------------ distilling ------------------------------


def distiller_of(config, teacher_config, model, folder, **options):
    torch.save(model.state_dict(), folder / 'teacher.pth')
    MessageHub.get_instance(uuid.uuid4().hex).update_info('epoch', 0)
    distiller = build(dict(
        type='mmgcp.SpatialAttentionDistiller', groups=[],
        student=dict(config.model, _scope_=config.default_scope),
        teacher=dict(config=teacher_config, checkpoint=str(folder / 'teacher.pth')),
        response=dict(type='mmgcp.LocalizationLoss', score_thr=0.001, **options)))
    disturb_head(distiller)
    return distiller.train()


def test_gradients_reach_the_student_only(teacher, tmp_path):
    config, model = teacher
    distiller = distiller_of(config, config, model, tmp_path)
    losses = distiller(*batch_for(config), mode='loss')
    names = {'loss_localization_main', 'loss_localization_valuable'}
    assert names < set(losses) and losses['loss_localization_main'] > 0
    sum(losses[name] for name in names).backward()
    for part in (distiller.backbone, distiller.neck, distiller.bbox_head):
        assert sum(param.grad.abs().sum() for param in part.parameters()
                   if param.grad is not None) > 0
    assert all(param.grad is None for param in distiller.teacher.parameters())
    assert list(distiller.state_dict()) == list(model.state_dict())


@needs_cpu_autocast
def test_single_precision_under_autocast(teacher, tmp_path):
    config, model = teacher
    distiller = distiller_of(config, config, model, tmp_path)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = distiller(*batch_for(config), mode='loss')['loss_localization_main']
        of_halves = edge_divergence(responses(0).edges, responses(1).edges, 10.)
    assert loss.dtype == of_halves.dtype == torch.float32 and loss > 0
    torch.testing.assert_close(of_halves, edge_divergence(
        responses(0).edges, responses(1).edges, 10.))


def test_the_teacher_itself_costs_nothing(teacher, tmp_path):
    config, model = teacher
    distiller = distiller_of(config, config, model, tmp_path)
    distiller.load_state_dict(model.state_dict())
    distiller.eval()
    show_distributions(distiller.student)
    losses = distiller(*batch_for(config), mode='loss')
    assert losses['loss_localization_main'].item() == pytest.approx(0, abs=1e-4)


def test_heads_that_predict_no_distributions(distiller_config):
    distiller_config.update(groups=[], response=dict(type='mmgcp.LocalizationLoss'))
    message = ('mmgcp.LocalizationLoss needs a head that predicts distributions of the edges of '
               'boxes, but the YOLOv4Head of the student does not')
    with pytest.raises(UserError, match=message):
        MODELS.build(distiller_config)


def test_distributions_over_other_distances(tmp_path):
    config, other = config_of('gfl'), config_of('gfl', reg_max=7)
    with pytest.raises(UserError, match='but are over 6 in the student and 8 in the teacher'):
        distiller_of(config, other, trained_detector(other), tmp_path)


def test_several_losses_of_the_response(tmp_path):
    config = config_of('yolov8')
    distiller = distiller_of(config, config, trained_detector(config), tmp_path)
    kinds = [dict(type='mmgcp.ResponseLoss'), dict(type='mmgcp.LocalizationLoss')]
    both = build(dict(
        type='mmgcp.SpatialAttentionDistiller', groups=[], student=config.model,
        teacher=dict(config=config, checkpoint=str(tmp_path / 'teacher.pth')), response=kinds))
    both.load_state_dict(distiller.state_dict())
    names = set(both.train()(*batch_for(config), mode='loss'))
    assert {'loss_response_cls', 'loss_response_box', 'loss_localization_main'} < names


@pytest.mark.parametrize('response, message', [
    ([dict(type='mmgcp.ResponseLoss')] * 2,
     r"of different types, but are \['ResponseLoss', 'ResponseLoss'\]"),
    ('mmgcp.ResponseLoss', "config of a loss or a list of them, but is 'mmgcp.ResponseLoss'"),
    (dict(type='mmgcp.PearsonLoss'),
     "no loss between the predictions of heads 'mmgcp.PearsonLoss'"),
])
def test_wrong_responses(distiller_config, response, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(distiller_config, response=response, student=yolov4()))

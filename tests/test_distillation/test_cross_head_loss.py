# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import uuid

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from older_stacks import needs_cpu_autocast
from small_heads import batch_for, config_of, disturb_head, trained_detector
from small_models import build
from test_response import giou_by_hand, responses
from tiers import slow_except
from torch.distributions import Categorical, kl_divergence
from torch.nn.modules.batchnorm import _BatchNorm
from yolov4_samples import batch, yolov4

from mmgcp.distillation import CrossHeadLoss
from mmgcp.distillation.cross_head_loss import quality_focal_loss
from mmgcp.distillation.cross_layers import find_prediction_layers
from mmgcp.distillation.responses import read_responses
from mmgcp.errors import UserError
from mmgcp.pruning import prune
from mmgcp.pruning.channel_table import count_channels
from mmgcp.pruning.detector import make_pruned_config
from mmgcp.registry import MODELS

HEAD = 'bbox_head.head_module'
BRIDGES = [f'{HEAD}.convs_bridge.{level}' for level in range(3)]
PREDICTIONS = [f'{HEAD}.convs_pred.{level}' for level in range(3)]


def sigmoid(value):
    return 1 / (1 + np.exp(-value.double().numpy()))


# ------------------------------- formulas -------------------------------


def focal_by_hand(student, teacher, beta=1.):
    """The quality focal loss of raw scores."""
    p, q = sigmoid(student), sigmoid(teacher)
    return np.abs(q - p)**beta * -(q * np.log(p) + (1 - q) * np.log(1 - p))


@pytest.mark.parametrize('beta', [1., 2.])
def test_quality_focal_loss(beta):
    student, teacher = responses(0).scores, responses(1).scores
    np.testing.assert_allclose(quality_focal_loss(student, teacher, beta),
                               focal_by_hand(student, teacher, beta), rtol=1e-4, atol=1e-6)
    assert (quality_focal_loss(teacher, teacher, beta) == 0).all()


def test_parts_with_objectnesses():
    crossed, teacher = responses(0), responses(1)
    losses = CrossHeadLoss(weights=dict(obj=2.), beta=2.)(crossed, teacher)
    confidences = sigmoid(teacher.scores).max(-1) * sigmoid(teacher.objectnesses)
    total = confidences.sum()
    assert total > 1
    classes = (confidences * focal_by_hand(crossed.scores, teacher.scores, 2).sum(-1)).sum()
    objectnesses = focal_by_hand(crossed.objectnesses, teacher.objectnesses, 2).sum()
    boxes = sum(confidences[at] * (1 - giou_by_hand(crossed.boxes[at].tolist(),
                                                    teacher.boxes[at].tolist()))
                for at in np.ndindex(2, 6))
    assert {name: value.item() for name, value in losses.items()} == dict(
        loss_cross_cls=pytest.approx(classes / total, rel=1e-4),
        loss_cross_obj=pytest.approx(2 * objectnesses / total, rel=1e-4),
        loss_cross_box=pytest.approx(boxes / total, rel=1e-4))


def with_edges(seed):
    found = responses(seed, objectness=False)
    found.edges = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(seed))
    return found


@pytest.mark.parametrize('temperature', [1., 3.])
def test_parts_with_distributions(temperature):
    crossed, teacher = with_edges(0), with_edges(1)
    losses = CrossHeadLoss(temperature=temperature)(crossed, teacher)
    confidences = sigmoid(teacher.scores).max(-1)
    classes = focal_by_hand(crossed.scores, teacher.scores).sum()
    divergences = temperature**2 * kl_divergence(
        Categorical(logits=teacher.edges / temperature),
        Categorical(logits=crossed.edges / temperature)).mean(-1).numpy()
    assert {name: value.item() for name, value in losses.items()} == dict(
        loss_cross_cls=pytest.approx(classes / confidences.sum(), rel=1e-4),
        loss_cross_edge=pytest.approx(
            3 * (confidences * divergences).sum() / confidences.sum(), rel=1e-4))


def test_unsure_teacher():
    """Its confidences count as at least 1 altogether."""
    crossed, teacher = responses(0, False), responses(1, False)
    teacher.scores = teacher.scores - 20
    losses = CrossHeadLoss()(crossed, teacher)
    expected = focal_by_hand(crossed.scores, teacher.scores).sum()
    assert losses['loss_cross_cls'].item() == pytest.approx(expected, rel=1e-4)
    assert losses['loss_cross_box'] < 1e-6


@pytest.mark.parametrize('settings, message', [
    (dict(beta=0.5), r'beta must be a number in \[1, 100\], but is 0.5'),
    (dict(temperature=0), 'temperature must be .* but is 0'),
    (dict(weights=dict(main=1)), r"'cls', 'obj', 'box' and 'edge', but has \['main'\]"),
    (dict(layers='neck_outputs'), "names of layers below 'bbox_head', but is 'neck_outputs'"),
    (dict(layers=[]), r'but is \[\]'),
    (dict(layers=['neck.out_layers.0']), r"but is \['neck.out_layers.0'\]"),
    (dict(layers=[('bbox_head.a', 'neck.b')]), r"but is \[\('bbox_head.a', 'neck.b'\)\]"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(type='mmgcp.CrossHeadLoss', **settings))


# -------------------------------- layers --------------------------------

BRANCHES = {
    'yolov5': ['convs_pred.{}'],
    'yolov6-v3-m': ['cls_preds.{}', 'reg_preds.{}'],
    'yolov8': ['cls_preds.{}.2', 'reg_preds.{}.2'],
    'yolox': ['multi_level_conv_cls.{}', 'multi_level_conv_reg.{}', 'multi_level_conv_obj.{}'],
    'rtmdet': ['rtm_cls.{}', 'rtm_reg.{}'],
    'ppyoloe': ['cls_preds.{}', 'reg_preds.{}'],
}


@pytest.mark.parametrize('kind', BRANCHES)
def test_layers_that_emit_the_predictions(kind):
    model = trained_detector(config_of(kind))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert find_prediction_layers(model) == [
        f'{HEAD}.{branch.format(level)}' for branch in BRANCHES[kind] for level in range(3)]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_that_run_at_every_level():
    assert find_prediction_layers(trained_detector(config_of('gfl'))) == [
        'bbox_head.gfl_cls', 'bbox_head.gfl_reg']


# ------------------------------- YOLOv4 by hand -------------------------------


@pytest.fixture
def cross_config(distiller_config):
    distiller_config.update(groups=[], response=dict(type='mmgcp.CrossHeadLoss'))
    return distiller_config


def losses_of(distiller):
    return distiller(**distiller.data_preprocessor(batch(), True), mode='loss')


def cross_losses_of(distiller):
    return {name: value for name, value in losses_of(distiller).items()
            if name.startswith('loss_cross')}


def aligned(student, teacher):
    """The student's channels with the mean and deviation of the teacher's."""
    student, teacher = (feature.double().numpy() for feature in (student, teacher))
    axes = dict(axis=(0, 2, 3), keepdims=True)
    standard = (student - student.mean(**axes)) / np.sqrt(student.var(**axes) + 1e-6)
    return torch.from_numpy(
        standard * np.sqrt(teacher.var(**axes) + 1e-6) + teacher.mean(**axes)).float()


def test_features_cross_before_the_prediction_layers(cross_config):
    """The loss is that of the teacher's last convolutions on the adapted features."""
    distiller = build(cross_config)
    loss, = distiller.responses
    assert loss.layers == [(name, name) for name in PREDICTIONS]
    shapes = [tuple(adapter.weight.shape) for adapter in distiller.distill_adapters]
    assert shapes == [(64, 32, 1, 1), (128, 64, 1, 1), (256, 128, 1, 1)]

    student, teacher = copy.deepcopy(distiller.student), distiller.teacher
    inputs = distiller.data_preprocessor(batch(), True)['inputs']
    with torch.no_grad():
        outputs = []
        features = [model.extract_feat(inputs) for model in (student, teacher)]
        for level in range(3):
            mine, theirs = (model.get_submodule(BRIDGES[level])(found[level])
                            for model, found in zip((student, teacher), features))
            kernel = loss.adapters[level].weight[:, :, 0, 0]
            crossed = aligned(torch.einsum('oc,nchw->nohw', kernel, mine), theirs)
            found = teacher.get_submodule(PREDICTIONS[level])(crossed)
            # Three anchors of 4 coordinates, objectness and 3 classes
            found = found.view(2, 3, 8, *found.shape[-2:])
            outputs.append([found[:, :, part].flatten(1, 2) for part in (
                slice(5, 8), slice(0, 4), slice(4, 5))])
        expected = loss(read_responses(teacher.bbox_head, list(zip(*outputs))),
                        read_responses(teacher.bbox_head, teacher(inputs, mode='tensor')))
    found = cross_losses_of(distiller)
    assert set(found) == {'loss_cross_cls', 'loss_cross_obj', 'loss_cross_box'}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_gradients(cross_config):
    """They reach what lies before the student's last convolutions, and nothing of the teacher."""
    distiller = build(cross_config)
    sum(cross_losses_of(distiller).values()).backward()
    for name in ('backbone.stem', 'bbox_head.head_module.convs_bridge.0'):
        assert distiller.get_submodule(name).conv.weight.grad.abs().sum() > 0
    assert all(distiller.get_submodule(name).weight.grad is None for name in PREDICTIONS)
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in distiller.distill_adapters)
    assert all(param.grad is None for param in distiller.teacher.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks
                   for model in (distiller, distiller.teacher) for module in model.modules())


@pytest.mark.parametrize('layers', [BRIDGES, list(zip(BRIDGES, BRIDGES))])
def test_chosen_layers(cross_config, layers):
    """Features may cross one convolution earlier."""
    cross_config['response']['layers'] = layers
    distiller = build(cross_config)
    assert [adapter.weight.shape[:2] for adapter in distiller.distill_adapters] == [
        (32, 16), (64, 32), (128, 64)]
    sum(cross_losses_of(distiller).values()).backward()
    assert distiller.backbone.stem.conv.weight.grad.abs().sum() > 0
    assert distiller.get_submodule(BRIDGES[0]).conv.weight.grad is None


def test_student_with_other_classes(cross_config):
    """The teacher's head makes both predictions, so that they correspond."""
    cross_config['student'] = yolov4(num_classes=5)
    assert torch.isfinite(sum(cross_losses_of(build(cross_config)).values()))


def test_names_are_the_students(cross_config):
    distiller, student = build(cross_config), build(yolov4())
    assert list(distiller.state_dict()) == list(student.state_dict())
    names = [name for name, _ in student.named_parameters()]
    assert [name for name, _ in distiller.named_parameters()] == names + [
        f'distill_adapters.{number}.weight' for number in range(3)]


def test_copies_have_adapters_of_their_own(cross_config):
    distiller = build(cross_config)
    copied = copy.deepcopy(distiller)
    assert set(copied.responses[0].adapters) == set(copied.distill_adapters)
    assert not set(copied.distill_adapters) & set(distiller.distill_adapters)
    for name, value in cross_losses_of(distiller).items():
        torch.testing.assert_close(cross_losses_of(copied)[name], value)


def test_after_the_stop_epoch_adapters_still_have_gradients(cross_config):
    distiller = build(dict(cross_config, schedule=dict(stop_epoch=1)))
    hub = MessageHub.get_instance(uuid.uuid4().hex)
    hub.update_info_dict(dict(iter=5, max_iters=10, max_epochs=2))
    losses = losses_of(distiller)
    assert losses['loss_cross_cls'] == 0 and 'loss_cross_obj' not in losses
    losses['loss_cross_cls'].backward()
    assert all((adapter.weight.grad == 0).all() for adapter in distiller.distill_adapters)


def test_adapters_of_parts_without_weight_still_have_gradients(cross_config):
    cross_config['response']['weights'] = dict(cls=0, obj=0, box=0)
    distiller = build(cross_config)
    losses = cross_losses_of(distiller)
    assert len(losses) == 3 and all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all((adapter.weight.grad == 0).all() for adapter in distiller.distill_adapters)


@needs_cpu_autocast
def test_single_precision_under_autocast(cross_config):
    distiller = build(cross_config)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = cross_losses_of(distiller)
    expected = cross_losses_of(distiller)
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.01)


def test_training_lowers_the_loss(cross_config):
    distiller = build(cross_config)
    optim_wrapper = OptimWrapper(torch.optim.Adam(distiller.parameters(), lr=2e-3))
    logs = [distiller.train_step(batch(), optim_wrapper) for _ in range(8)]
    totals = [sum(float(value) for name, value in log.items() if name.startswith('loss_cross'))
              for log in logs]
    assert totals[-1] < 0.8 * totals[0]


# ------------------------------ other heads ------------------------------


def distiller_of(config, folder, student=None, **options):
    """A distiller with a teacher of a config and, unless it has another one, such a student."""
    model = trained_detector(config)
    torch.save(model.state_dict(), folder / 'teacher.pth')
    MessageHub.get_instance(uuid.uuid4().hex).update_info('epoch', 0)
    return build(dict(
        type='mmgcp.SpatialAttentionDistiller', groups=[],
        student=dict(student or config.model, _scope_=config.default_scope),
        teacher=dict(config=config, checkpoint=str(folder / 'teacher.pth')),
        response=dict(type='mmgcp.CrossHeadLoss', **options))).train()


PARTS = {
    'yolov7-w-p6': {'cls', 'obj', 'box'},
    'yolov5': {'cls', 'obj', 'box'}, 'yolox': {'cls', 'obj', 'box'}, 'rtmdet': {'cls', 'box'},
    'yolov6-v3-m': {'cls', 'edge'}, 'yolov8': {'cls', 'edge'}, 'ppyoloe': {'cls', 'edge'},
    'gfl': {'cls', 'edge'},
}


FAST = ('yolov5', 'yolov8', 'gfl')


@pytest.mark.parametrize('kind', slow_except(FAST, PARTS))
def test_heads(kind, tmp_path):
    config = config_of(kind)
    narrow = config_of(kind, width=0.0625)
    distiller = distiller_of(config, tmp_path, narrow.model)
    losses = distiller(*batch_for(config), mode='loss')
    crossed = {name: value for name, value in losses.items() if name.startswith('loss_cross')}
    assert set(crossed) == {f'loss_cross_{part}' for part in PARTS[kind]}
    assert all(torch.isfinite(value) and value > 0 for value in crossed.values())
    sum(crossed.values()).backward()
    for part in (distiller.backbone, distiller.neck):
        assert sum(param.grad.abs().sum() for param in part.parameters()
                   if param.grad is not None) > 0
    # The branches of these have the same number of channels at either width
    assert (len(distiller.distill_adapters) > 0) == (kind not in ('yolov8', 'yolov7-w-p6'))
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in distiller.distill_adapters)
    assert all(param.grad is None for param in distiller.teacher.parameters())


@pytest.mark.parametrize('kind', slow_except(FAST, PARTS))
def test_the_teacher_itself_costs_nothing(kind, tmp_path):
    config = config_of(kind)
    distiller = distiller_of(config, tmp_path)
    assert len(distiller.distill_adapters) == 0
    distiller.load_state_dict(distiller.teacher.state_dict())
    for module in distiller.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    losses = distiller(*batch_for(config), mode='loss')
    # Some boxes of these are empty without training, and empty boxes never overlap
    for part in PARTS[kind] - ({'box'} if kind in ('rtmdet', 'yolov7-w-p6') else set()):
        assert losses[f'loss_cross_{part}'].item() == pytest.approx(0, abs=1e-4)
    disturb_head(distiller)
    losses = distiller(*batch_for(config), mode='loss')
    if kind != 'yolov5':  # whose features cross right after the neck
        assert losses['loss_cross_cls'] > 1e-4


def test_earlier_layers_of_yolov8(tmp_path):
    """Those of the documentation: one convolution before the last."""
    layers = [f'{HEAD}.{branch}_preds.{level}.1'
              for branch in ('cls', 'reg') for level in range(3)]
    distiller = distiller_of(config_of('yolov8'), tmp_path, layers=layers)
    losses = distiller(*batch_for(config_of('yolov8')), mode='loss')
    (losses['loss_cross_cls'] + losses['loss_cross_edge']).backward()
    branch = distiller.bbox_head.head_module.cls_preds[0]
    assert branch[0].conv.weight.grad.abs().sum() > 0
    assert branch[1].conv.weight.grad is None and branch[2].weight.grad is None


def test_pruned_student(tmp_path):
    config = config_of('yolov8')
    teacher = trained_detector(config)
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            nn.init.uniform_(module.weight, 0.2, 1.5)  # what channels are pruned by
    full = count_channels(teacher)
    pruned = prune(teacher, ratio=0.5, input_shape=(3, 128, 128)).model
    table = {layer: counts for layer, counts in count_channels(pruned).items()
             if counts != full[layer]}
    student = make_pruned_config(config, 'mmyolo.YOLODetector', table).model
    distiller = distiller_of(config, tmp_path, student)
    distiller.load_state_dict(pruned.state_dict(), strict=True)
    for adapter, (name, _) in zip(distiller.responses[0].adapters, distiller.responses[0].layers):
        assert adapter.in_channels == pruned.get_submodule(name).in_channels
        assert adapter.out_channels == distiller.teacher.get_submodule(name).in_channels
    losses = distiller(*batch_for(config), mode='loss')
    (losses['loss_cross_cls'] + losses['loss_cross_edge']).backward()
    assert distiller.backbone.stem.conv.weight.grad.abs().sum() > 0
    pruned.load_state_dict(distiller.state_dict(), strict=True)


# -------------------------------- errors --------------------------------


@pytest.mark.parametrize('layers, message', [
    ([f'{HEAD}.convs_prd.0'], f"the student has no module '{HEAD}.convs_prd.0'; the closest"),
    ([(BRIDGES[0], f'{HEAD}.x')], f"the teacher has no module '{HEAD}.x'"),
    ([(BRIDGES[0], BRIDGES[1])], r"of the student reads maps of the sizes \[\(16, 16\)\], but "
     r"the layer '.*convs_bridge.1' of the teacher \[\(8, 8\)\]"),
    ([HEAD], 'of the student must read feature maps'),
    (['bbox_head.loss_cls'], 'of the student must read feature maps'),
])
def test_wrong_layers(cross_config, layers, message):
    cross_config['response']['layers'] = layers
    with pytest.raises(UserError, match=message):
        MODELS.build(cross_config)


def test_heads_of_different_layers(tmp_path):
    message = "name the layers of mmgcp.CrossHeadLoss: .*rtm_reg.2'] in the student and by .*cls_pr"
    with pytest.raises(UserError, match=message):
        distiller_of(config_of('yolov8'), tmp_path, config_of('rtmdet').model)


def test_detector_without_such_a_head(cross_config):
    cross_config['student'] = dict(
        _scope_='mmdet', type='RetinaNet',
        backbone=dict(type='MobileNetV2', widen_factor=0.125, out_indices=(0, )), neck=None,
        bbox_head=dict(type='RetinaHead', num_classes=1, in_channels=8, stacked_convs=0,
                       feat_channels=8))
    with pytest.raises(UserError, match='the head of the student is a RetinaHead'):
        MODELS.build(cross_config)

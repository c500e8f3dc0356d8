# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Distilling with derived layers in each of MMYOLO's families."""
import pytest
import torch
from families import compute_loss
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from small_models import build
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.pruning import prune
from mmgcp.pruning.channel_table import count_channels
from mmgcp.pruning.detector import make_pruned_config
from mmgcp.utils.config import build_detector, load_config

WIDTHS = {f'model.{part}.widen_factor': 0.125
          for part in ('backbone', 'neck', 'bbox_head.head_module')}
STAGES = [f'backbone.stage{number}' for number in (2, 3, 4)]
PAFPN = ['neck.top_down_layers.1', 'neck.bottom_up_layers.0', 'neck.bottom_up_layers.1']
OUT_LAYERS = [f'neck.out_layers.{level}' for level in range(3)]

FAMILIES = {
    'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py': (WIDTHS, PAFPN, True),
    'yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py': (WIDTHS, PAFPN, False),
    'yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py': (WIDTHS, OUT_LAYERS, True),
    'yolov7/yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py': (WIDTHS, None, True),
    'yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py': (WIDTHS, PAFPN, False),
    'yolox/yolox_tiny_fast_8xb8-300e_coco.py': (WIDTHS, OUT_LAYERS, True),
    'rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py': (WIDTHS, OUT_LAYERS, False),
    'ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py': (WIDTHS, PAFPN, False),
}


def batch_of(size):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[0, 1, .1, .1, .6, .7], [1, 2, .3, .4, .9, .9], [1, 0, 0, 0, .3, .25]])
    boxes[:, 2:] *= size
    return torch.rand(2, 3, size, size, generator=generator), dict(
        bboxes_labels=boxes, img_metas=[dict(batch_input_shape=(size, size))] * 2)


def _calibrate(model):
    """Let the statistics of the normalisation fit, or signals fade away in eval mode."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average
    with torch.no_grad():
        model.train()(batch_of(128)[0], mode='tensor')


@pytest.fixture(params=FAMILIES, ids=lambda path: path.split('/')[1].split('_syncbn')[0][:12])
def family(request, tmp_path):
    """A distiller whose teacher has the same config, its derived neck layers, objectness."""
    options, neck, has_objectness = FAMILIES[request.param]
    config = load_config(f'mmyolo::{request.param}',
                         {**options, 'model.backbone.init_cfg': None})
    torch.manual_seed(1)
    teacher = build_detector(config)
    teacher.init_weights()
    for param in teacher.bbox_head.parameters():
        if param.requires_grad:  # some heads begin with zeros
            param.data += 0.05 * torch.randn_like(param)
    _calibrate(teacher)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    distiller = build(dict(
        type='mmgcp.SpatialAttentionDistiller', student=config.model,
        teacher=dict(config=config, checkpoint=str(tmp_path / 'teacher.pth')),
        response=dict(type='mmgcp.ResponseLoss', score_thr=0.)))
    MessageHub.get_current_instance().update_info('epoch', 0)
    return distiller.train(), neck, has_objectness


def test_family(family):
    distiller, neck, has_objectness = family
    backbone, neck_group = distiller.groups
    if neck is not None:
        assert backbone.layers == [(name, name) for name in STAGES]
        assert neck_group.layers == [(name, name) for name in neck]
    assert len(backbone.layers) == len(neck_group.layers) == distiller.bbox_head.num_levels

    inputs, samples = batch_of(128)
    optimizer = torch.optim.Adam(distiller.parameters(), lr=1e-3)
    expected = {'loss_attention_backbone', 'loss_attention_neck', 'loss_response_cls',
                'loss_response_box'} | ({'loss_response_obj'} if has_objectness else set())
    for _ in range(2):
        losses = distiller(inputs, samples, mode='loss')
        assert {name for name in losses
                if name.startswith(('loss_attention', 'loss_response'))} == expected
        total = distiller.parse_losses(losses)[0]
        assert torch.isfinite(total) and all(losses[name] > 0 for name in expected)
        optimizer.zero_grad()
        sum(losses[name] for name in expected).backward()
        for part in (distiller.backbone, distiller.neck, distiller.bbox_head):
            assert sum(param.grad.abs().sum() for param in part.parameters()
                       if param.grad is not None) > 0
        optimizer.step()
    assert all(param.grad is None for param in distiller.teacher.parameters())

    optimizer = torch.optim.Adam(distiller.parameters(), lr=3e-3)  # without the past
    history = []
    for _ in range(10):
        losses = distiller(inputs, samples, mode='loss')
        attention = losses['loss_attention_backbone'] + losses['loss_attention_neck']
        history.append(attention.item())
        optimizer.zero_grad()
        attention.backward()
        optimizer.step()
    assert history[-1] < 0.8 * history[0]


def test_pruned_student(tmp_path):
    path = 'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py'
    config = load_config(path, {**WIDTHS, 'model.backbone.init_cfg': None})
    torch.manual_seed(1)
    teacher = build_detector(config)
    teacher.init_weights()
    for module in teacher.modules():
        if isinstance(module, _BatchNorm):
            torch.nn.init.uniform_(module.weight, 0.2, 1.5)  # what channels are pruned by
    _calibrate(teacher)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    full = count_channels(teacher)
    pruned = prune(teacher, ratio=0.5, input_shape=(3, 128, 128)).model
    table = {layer: counts for layer, counts in count_channels(pruned).items()
             if counts != full[layer]}
    student = make_pruned_config(config, 'mmyolo.YOLODetector', table).model
    distiller = build(dict(
        type='mmgcp.SpatialAttentionDistiller', student=student,
        teacher=dict(config=config, checkpoint=str(tmp_path / 'teacher.pth')),
        groups=[dict(name='backbone', weight=1e3, layers='backbone_outputs'),
                dict(name='neck', weight=1., layers='neck_outputs',
                     loss=dict(type='mmgcp.ChannelWiseLoss'))],
        response=dict(type='mmgcp.ResponseLoss')))
    assert [pair for group in distiller.groups for pair in group.layers] == [
        (name, name) for name in STAGES + PAFPN]
    assert len(distiller.distill_adapters) > 0
    distiller.load_state_dict(pruned.state_dict(), strict=True)
    MessageHub.get_current_instance().update_info('epoch', 0)
    losses = distiller(*batch_of(128), mode='loss')
    assert {'loss_attention_backbone', 'loss_channel_neck', 'loss_response_cls'} < set(losses)
    losses['loss_channel_neck'].backward()
    assert distiller.backbone.stem.conv.weight.grad.abs().sum() > 0
    assert all(adapter.weight.grad.abs().sum() > 0 for adapter in distiller.distill_adapters)
    pruned.load_state_dict(distiller.state_dict(), strict=True)


def test_two_stage_detector(tmp_path):
    """Its teacher runs the backbone and the neck alone; both parts learn."""
    config = load_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', {
        'model.backbone.depth': 18, 'model.backbone.base_channels': 8, 'model.neck.out_channels': 8,
        'model.neck.in_channels': [8, 16, 32, 64], 'model.backbone.init_cfg': None,
        'model.rpn_head.in_channels': 8, 'model.rpn_head.feat_channels': 8,
        'model.roi_head.bbox_roi_extractor.out_channels': 8,
        'model.roi_head.bbox_head.in_channels': 8, 'model.roi_head.bbox_head.fc_out_channels': 8})
    teacher = build_detector(config)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    table = prune(teacher, ratio=0.5, compensate=False, input_shape=(3, 128, 128),
                  criterion=dict(type='mmgcp.Random', seed=0)).changed_channels
    with DefaultScope.overwrite_default_scope('mmdet'):
        distiller = build(dict(
            type='mmgcp.SpatialAttentionDistiller',
            student=make_pruned_config(config, 'mmdet.FasterRCNN', table).model,
            teacher=dict(config=config, checkpoint=str(tmp_path / 'teacher.pth'))))
    backbone, neck = distiller.groups
    assert backbone.layers == [(f'backbone.layer{number}', ) * 2 for number in range(1, 5)]
    assert neck.layers == [(f'neck.fpn_convs.{level}', ) * 2 for level in range(4)]
    compute_loss(distiller, 128).backward()
    for part in (distiller.backbone, distiller.neck, distiller.roi_head):
        assert sum(float(param.grad.abs().sum()) for param in part.parameters()
                   if param.grad is not None) > 0


def test_images_of_four_channels(tmp_path):
    config = load_config('mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py', {
        **WIDTHS, 'model.backbone.init_cfg': None, 'model.backbone.input_channels': 4})
    torch.save(build_detector(config).state_dict(), tmp_path / 'teacher.pth')
    distiller = build(dict(
        type='mmgcp.SpatialAttentionDistiller', student=config.model,
        teacher=dict(config=config, checkpoint=str(tmp_path / 'teacher.pth'))))
    assert len(distiller.groups) == 2
    images, samples = batch_of(128)
    losses = distiller(torch.cat((images, images[:, :1]), 1), samples, mode='loss')
    assert losses['loss_attention_backbone'] > 0

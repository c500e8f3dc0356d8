# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Narrow detectors with other heads than YOLOv4's, as configs, and batches to train them on."""
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.structures import InstanceData
from older_stacks import config_or_skip
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.utils.config import build_detector

MMYOLO = {
    'yolov6-v3-m': 'yolov6/yolov6_v3_m_syncbn_fast_8xb32-300e_coco.py',
    'yolov7-w-p6': 'yolov7/yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov8': 'yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    'ppyoloe': 'ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    'rtmdet': 'rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
    'yolov5': 'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolox': 'yolox/yolox_tiny_fast_8xb8-300e_coco.py',
}
WITH_EDGES = ('yolov6-v3-m', 'yolov8', 'ppyoloe', 'gfl')
SIZE = 128


def config_of(kind, width=0.125, **options):
    """The config of a detector with 80 classes (GFL: 3), whose width is a share of the full one."""
    if kind == 'gfl':
        return gfl(round(64 * width), **options)
    widths = {f'model.{part}.widen_factor': width
              for part in ('backbone', 'neck', 'bbox_head.head_module')}
    return config_or_skip(f'mmyolo::{MMYOLO[kind]}',
                          {**widths, 'model.backbone.init_cfg': None, **options})


def gfl(channels, reg_max=5, **head):
    """A GFL of MMDetection's for three classes."""
    return Config(dict(default_scope='mmdet', model=dict(
        type='GFL',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
        backbone=dict(type='MobileNetV2', widen_factor=0.125, out_indices=(2, 4)),
        neck=dict(type='FPN', in_channels=[8, 16], out_channels=channels, num_outs=2),
        bbox_head=dict(
            type='GFLHead', num_classes=3, in_channels=channels, feat_channels=channels,
            stacked_convs=1, norm_cfg=dict(type='GN', num_groups=2), reg_max=reg_max,
            anchor_generator=dict(type='AnchorGenerator', ratios=[1.], octave_base_scale=8,
                                  scales_per_octave=1, strides=[8, 16]),
            loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2., loss_weight=1.),
            loss_bbox=dict(type='GIoULoss', loss_weight=2.),
            **head),
        train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1,
                       pos_weight=-1, debug=False),
        test_cfg=dict(nms_pre=1000, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.6),
                      max_per_img=100))))


def trained_detector(config, seed=1):
    """A detector with weights and statistics that let it predict something else everywhere."""
    torch.manual_seed(seed)
    model = build_detector(config)
    model.init_weights()
    disturb_head(model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average
    with torch.no_grad():
        model.train()(images(), mode='tensor')
    return model.eval()


def disturb_head(model):
    """Add noise to the parameters of the head, some of which begin with zeros."""
    for param in model.bbox_head.parameters():
        if param.requires_grad:
            param.data += 0.05 * torch.randn_like(param)


def images():
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def batch_for(config):
    """Two images with three boxes, in the form that the detector of a config takes."""
    boxes = torch.tensor([[.1, .1, .6, .7], [.3, .4, .9, .9], [0., 0., .3, .25]]) * SIZE
    labels, owners = torch.tensor([1, 2, 0]), torch.tensor([0, 1, 1])
    if config.default_scope == 'mmyolo':
        return images(), dict(
            bboxes_labels=torch.cat((owners[:, None], labels[:, None], boxes), 1),
            img_metas=[dict(batch_input_shape=(SIZE, SIZE))] * 2)
    shapes = dict(img_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE), scale_factor=(1., 1.),
                  batch_input_shape=(SIZE, SIZE))
    return images(), [DetDataSample(metainfo=shapes, gt_instances=InstanceData(
        bboxes=boxes[owners == number], labels=labels[owners == number])) for number in range(2)]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Small detectors and batches for the tests of the distillation."""
import copy

import numpy as np
import torch
from mmengine.config import ConfigDict

import mmgcp  # noqa: F401
from mmgcp.registry import MODELS

GROUPS = [
    dict(name='backbone', weight=1e3, layers=['backbone.stage1', 'backbone.stage4']),
    dict(name='head', weight=10., layers=['bbox_head.head_module.convs_bridge.0']),
]


def yolov4(widen_factor=0.125, deepen_factor=0.1, num_classes=3):
    """Config of a small YOLOv4."""
    factors = dict(deepen_factor=deepen_factor, widen_factor=widen_factor)
    return dict(
        type='YOLODetector',
        data_preprocessor=dict(
            type='YOLOv5DetDataPreprocessor', mean=[0.] * 3, std=[255.] * 3, bgr_to_rgb=True),
        backbone=dict(type='mmgcp.YOLOv4CSPDarknet', **factors),
        neck=dict(
            type='mmgcp.YOLOv4PAFPN', in_channels=[256, 512, 1024],
            out_channels=[128, 256, 512], **factors),
        bbox_head=dict(
            type='mmgcp.YOLOv4Head',
            head_module=dict(
                type='mmgcp.YOLOv4HeadModule', num_classes=num_classes,
                in_channels=[128, 256, 512], widen_factor=widen_factor)),
        test_cfg=dict(
            multi_label=True, nms_pre=100, score_thr=0.001,
            nms=dict(type='nms', iou_threshold=0.6), max_per_img=10))


def build(config, seed=0):
    torch.manual_seed(seed)
    model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    model.init_weights()
    return model


def batch(seed=0, size=64):
    """What MMYOLO's yolov5_collate makes of two images."""
    rng = np.random.default_rng(seed)
    boxes = torch.tensor([[0, 1, 4, 4, 40, 40], [1, 2, 10, 20, 60, 50], [1, 0, 0, 0, 12, 9]])
    return dict(
        inputs=torch.from_numpy(rng.integers(0, 256, (2, 3, size, size), dtype=np.uint8)),
        data_samples=dict(bboxes_labels=boxes.float(), img_metas=[{}, {}]))

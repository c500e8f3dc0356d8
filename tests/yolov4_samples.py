# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A tiny YOLOv4: its config, a batch for it, and config files with and without data."""
import copy

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from pruning_samples import randomise
from scripts import ROOT

import mmgcp  # noqa: F401
from mmgcp.datasets.demo import CLASSES
from mmgcp.registry import MODELS

BASE = ROOT / 'configs/yolov4/yolov4_n_fast_1xb8-60e_voc-320.py'
CONFIG_TEXT = """
_base_ = {base!r}
factors = dict(deepen_factor=0.33, widen_factor={widen_factor})
model = dict(
    backbone=factors, neck=factors,
    bbox_head=dict(
        head_module=dict(num_classes={num_classes}, widen_factor=factors['widen_factor'])))
train_dataloader = dict(dataset=dict(data_root='absent'))
val_dataloader = dict(dataset=dict(data_root='absent'))
"""
DATA_TEXT = """
data_root = {data_root!r}
img_scale = (96, 96)
max_epochs = 1
sparse_epochs = 1
distill_epochs = 1
metainfo = dict(classes={classes!r})
affine = dict(type='YOLOv5RandomAffine', max_rotate_degree=0., max_shear_degree=0.,
              scaling_ratio_range=(0.5, 1.5), border=(-48, -48), border_val=(114, 114, 114))
train_pipeline = [
    *_base_.pre_transform,
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0, pre_transform=_base_.pre_transform),
    affine, *_base_.train_pipeline[-3:]
]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(type='YOLOv5KeepRatioResize', scale=img_scale),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
    *_base_.test_pipeline[-2:]
]
loader = dict(batch_size=4, num_workers=0, persistent_workers=False)
data = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **data), **loader)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data), **loader)
test_dataloader = val_dataloader
default_hooks = dict(
    param_scheduler=dict(max_epochs=max_epochs),
    checkpoint=dict(interval=1, save_best=None), logger=dict(interval=1))
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
"""


def yolov4(widen_factor=0.125, deepen_factor=0.33, num_classes=3, norm_cfg=None, **backbone):
    """Config of a small YOLOv4."""
    factors = dict(widen_factor=widen_factor)
    if norm_cfg:
        factors['norm_cfg'] = norm_cfg
    return dict(
        type='YOLODetector',
        data_preprocessor=dict(
            type='YOLOv5DetDataPreprocessor', mean=[0.] * 3, std=[255.] * 3, bgr_to_rgb=True),
        backbone=dict(type='mmgcp.YOLOv4CSPDarknet', deepen_factor=deepen_factor, **factors,
                      **backbone),
        neck=dict(
            type='mmgcp.YOLOv4PAFPN', in_channels=[256, 512, 1024],
            out_channels=[128, 256, 512], deepen_factor=deepen_factor, **factors),
        bbox_head=dict(
            type='mmgcp.YOLOv4Head',
            head_module=dict(
                type='mmgcp.YOLOv4HeadModule', num_classes=num_classes,
                in_channels=[128, 256, 512], **factors)),
        test_cfg=dict(
            multi_label=True, nms_pre=100, score_thr=0.001,
            nms=dict(type='nms', iou_threshold=0.6), max_per_img=10))


def build(config, seed=0):
    """Build a detector with random weights and statistics."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        return randomise(MODELS.build(ConfigDict(copy.deepcopy(config))), seed)


def batch(seed=0, size=64):
    """What MMYOLO's yolov5_collate makes of two images."""
    rng = np.random.default_rng(seed)
    boxes = torch.tensor([[0, 1, 4, 4, 40, 40], [1, 2, 10, 20, 60, 50], [1, 0, 0, 0, 12, 9]])
    return dict(
        inputs=torch.from_numpy(rng.integers(0, 256, (2, 3, size, size), dtype=np.uint8)),
        data_samples=dict(bboxes_labels=boxes.float(), img_metas=[{}, {}]))


def config_text(widen_factor=0.125, num_classes=3):
    """Text of a config of the detector, whose data do not exist."""
    return CONFIG_TEXT.format(base=str(BASE), widen_factor=widen_factor, num_classes=num_classes)


def config_text_with_data(data_root, classes=CLASSES, widen_factor=0.125):
    """Text of a config that trains the detector for an epoch on images of 96 pixels."""
    return config_text(widen_factor, len(classes)) + DATA_TEXT.format(
        data_root=str(data_root), classes=tuple(classes))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A tiny YOLOv4 with random weights and statistics, and its files."""
import math

import torch
from mmengine.registry import MODELS, DefaultScope

from mmgcp.darknet import Header, darknet_parameters, darknet_sections, format_cfg, write_weights

SIZE = (96, 64)  # width, height
NUM_CLASSES = 3
WIDEN_FACTOR = 0.125
DEEPEN_FACTOR = 0.33


def tiny_config(eps=1e-5, widen_factor=WIDEN_FACTOR, deepen_factor=DEEPEN_FACTOR,
                num_classes=NUM_CLASSES):
    cfg = dict(widen_factor=widen_factor, norm_cfg=dict(type='BN', momentum=0.03, eps=eps))
    return dict(
        type='YOLODetector',
        data_preprocessor=dict(
            type='YOLOv5DetDataPreprocessor', mean=[0., 0., 0.], std=[255., 255., 255.],
            bgr_to_rgb=True),
        backbone=dict(type='mmgcp.YOLOv4CSPDarknet', deepen_factor=deepen_factor, **cfg),
        neck=dict(type='mmgcp.YOLOv4PAFPN', in_channels=[256, 512, 1024],
                  out_channels=[128, 256, 512], **cfg),
        bbox_head=dict(
            type='mmgcp.YOLOv4Head',
            head_module=dict(type='mmgcp.YOLOv4HeadModule', num_classes=num_classes,
                             in_channels=[128, 256, 512], **cfg)),
        test_cfg=dict(multi_label=True, nms_pre=100, score_thr=0.001,
                      nms=dict(type='nms', iou_threshold=0.65), max_per_img=10))


def build(config):
    with DefaultScope.overwrite_default_scope('mmyolo'):
        return MODELS.build(config).eval()


def randomise(model, seed=0):
    """Random weights that keep activations of the order of one, and random statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, 1 / math.sqrt(fan_in), generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.5, generator=generator)
            elif isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3, generator=generator)
                module.bias.normal_(0, 0.2, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.6, 1.4, generator=generator)
    return model


def write_darknet(model, folder, size=SIZE):
    sections = darknet_sections(model, size)
    (folder / 'net.cfg').write_text(format_cfg(sections))
    write_weights(folder / 'net.weights', Header(seen=7), darknet_parameters(model))
    return folder / 'net.cfg', folder / 'net.weights'

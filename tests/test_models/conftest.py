# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.config import Config

import mmgcp  # noqa: F401
from mmgcp.utils.config import build_detector


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_detector():
    """A function that builds a small YOLOv4 with random BatchNorms."""

    def build(num_classes=3, widen_factor=0.125, deepen_factor=0.33):
        factors = dict(deepen_factor=deepen_factor, widen_factor=widen_factor)
        model = dict(
            type='YOLODetector',
            data_preprocessor=dict(
                type='YOLOv5DetDataPreprocessor', mean=[0.] * 3, std=[255.] * 3),
            backbone=dict(type='mmgcp.YOLOv4CSPDarknet', **factors),
            neck=dict(
                type='mmgcp.YOLOv4PAFPN', in_channels=[256, 512, 1024],
                out_channels=[128, 256, 512], **factors),
            bbox_head=dict(
                type='mmgcp.YOLOv4Head',
                head_module=dict(
                    type='mmgcp.YOLOv4HeadModule', num_classes=num_classes,
                    in_channels=[128, 256, 512], widen_factor=widen_factor)))
        detector = build_detector(Config(dict(default_scope='mmyolo', model=model)))
        detector.init_weights()
        return randomize_norms(detector)

    return build


@pytest.fixture
def random_norms():
    return randomize_norms


def randomize_norms(model):
    """Give BatchNorms the statistics and parameters of no particular layer."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.2)
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmengine.config import Config
from yolov4_samples import yolov4

from mmgcp.utils.config import build_detector


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_detector():
    """A function that builds a small YOLOv4 with random BatchNorms."""

    def build(**factors):
        detector = build_detector(Config(dict(default_scope='mmyolo', model=yolov4(**factors))))
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

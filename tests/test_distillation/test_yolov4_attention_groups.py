# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmengine.config import Config
from yolov4_samples import yolov4

from mmgcp.distillation import FeatureRecorder
from mmgcp.registry import MODELS

CONFIG = Path(__file__).parents[2] / 'configs/_base_/distill/yolov4_groups.py'
# Numbers of the convolutions and channels: the paper and its code
NUMBERS = dict(backbone=[7, 16, 37, 58], coarse=[78, 106], fine=[85, 92, 99])
CHANNELS = dict(backbone=[64, 128, 256, 512], coarse=[256, 1024], fine=[128, 256, 256])
WEIGHTS = dict(backbone=1e6, coarse=1e3, fine=1e4)


def darknet_order():
    """Names of YOLOv4's convolutions in the order of yolov4.cfg."""
    names = ['backbone.stem']
    for stage, num_blocks in enumerate((1, 2, 8, 8, 4), 1):
        csp = f'backbone.stage{stage}.1'
        names += [f'backbone.stage{stage}.0', f'{csp}.short_conv', f'{csp}.main_conv']
        names += [f'{csp}.blocks.{i}.conv{j}' for i in range(num_blocks) for j in (1, 2)]
        names += [f'{csp}.post_conv', f'{csp}.final_conv']
    names += [f'neck.reduce_layers.2.{part}_convs.{i}' for part in ('pre', 'post')
              for i in range(3)]
    for step in range(2):
        names += [f'neck.upsample_layers.{step}.0', f'neck.reduce_layers.{1 - step}']
        names += [f'neck.top_down_layers.{step}.{i}' for i in range(5)]
    for level in range(3):
        if level:
            names += [f'neck.downsample_layers.{level - 1}']
            names += [f'neck.bottom_up_layers.{level - 1}.{i}' for i in range(5)]
        names += [f'bbox_head.head_module.convs_{part}.{level}' for part in ('bridge', 'pred')]
    return names


@pytest.fixture(scope='module')
def groups():
    return Config.fromfile(CONFIG).attention_groups


@pytest.fixture
def model():
    return MODELS.build(yolov4(widen_factor=0.125, deepen_factor=1.0))


def last_conv(module):
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)][-1]


def test_darknet_order_has_each_convolution_once(model):
    convs = [module.conv if isinstance(module, ConvModule) else module
             for module in map(model.get_submodule, darknet_order())]
    assert len(convs) == 110
    assert {id(conv) for conv in convs} == {
        id(module) for module in model.modules() if isinstance(module, nn.Conv2d)}


def test_layers_have_the_published_numbers(model, groups):
    order = {id(last_conv(model.get_submodule(name))): number
             for number, name in enumerate(darknet_order())}
    for group in groups:
        numbers = [order[id(last_conv(model.get_submodule(name)))] for name in group['layers']]
        assert numbers == NUMBERS[group['name']]


def test_layers_have_the_published_channels(model, groups):
    for group in groups:
        convs = [last_conv(model.get_submodule(name)) for name in group['layers']]
        assert [conv.out_channels * 8 for conv in convs] == CHANNELS[group['name']]


def test_weights(groups):
    assert {group['name']: group['weight'] for group in groups} == WEIGHTS


def test_layers_give_their_channels_and_strides(model, groups):
    strides = dict(backbone=[2, 4, 8, 16], coarse=[32, 32], fine=[16, 8, 16])
    names = [name for group in groups for name in group['layers']]
    with torch.no_grad(), FeatureRecorder(model, names).record() as features:
        model(torch.rand(1, 3, 64, 64), mode='tensor')
    shapes = [(channels // 8, 64 // stride) for group in groups
              for channels, stride in zip(CHANNELS[group['name']], strides[group['name']])]
    assert [tuple(features[name].shape[1:3]) for name in names] == shapes

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from meta_device import on_meta
from mmengine.config import Config

from mmgcp.analysis import ConvStatistics, count_complexity, record_convs
from mmgcp.errors import UserError
from mmgcp.utils.config import build_detector

CONFIGS = Path(__file__).parents[2] / 'configs/yolov4'


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, (3, 1), padding=(1, 0), groups=4, bias=False)
        self.shared = nn.Conv2d(12, 12, 1)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.fc = nn.Linear(6, 5)
        self.unused = nn.Conv2d(7, 7, 7)
        self.fail = False

    def forward(self, x, mode):
        assert mode == 'tensor' and not self.training and not torch.is_grad_enabled()
        x = self.grouped(self.norm(self.conv(x)))
        x = self.shared(nn.functional.max_pool2d(self.shared(x), 2))
        if self.fail:
            raise RuntimeError('failed')
        return self.fc(self.up(x).mean((2, 3)))


@pytest.fixture
def net():
    return Net().train()


def test_record_convs_by_hand(net):
    # 16x24 image: the first two at 8x12, the shared one at 8x12 and 4x6, the other at 4x6
    assert record_convs(net, (3, 16, 24)) == dict(
        conv=ConvStatistics(3, 8, 9, 96), grouped=ConvStatistics(8, 12, 3, 96, groups=4),
        shared=ConvStatistics(12, 12, 1, 96 + 24), up=ConvStatistics(12, 6, 4, 24),
        fc=ConvStatistics(6, 5, 1, 1), unused=ConvStatistics(7, 7, 49, 0))


def test_count_complexity_by_hand(net):
    params = (3 * 8 * 9 + 8) + 16 + 2 * 12 * 3 + (144 + 12) + (12 * 6 * 4 + 6) + 35 + (7**4 + 7)
    macs = 216 * 96 + 72 * 96 + 144 * 120 + 288 * 24 + 30
    assert count_complexity(net, (3, 16, 24)) == (params, macs)


@pytest.mark.parametrize('item, weights, macs', [
    (ConvStatistics(3, 5, 9, 7), 135, 945),
    (ConvStatistics(3, 5, 9, 0), 135, 0),
    (ConvStatistics(8, 12, 3, 2, groups=4), 72, 144),
    (ConvStatistics(8, 8, 9, 5, groups=8), 72, 360),
])
def test_statistics(item, weights, macs):
    assert (item.weights, item.macs) == (weights, macs)


@pytest.mark.parametrize('item, fewer, left', [
    (ConvStatistics(6, 5, 9, 7), (2, 0), ConvStatistics(4, 5, 9, 7)),
    (ConvStatistics(6, 5, 9, 7), (2, 3), ConvStatistics(4, 2, 9, 7)),
    (ConvStatistics(4, 4, 1, 7), (1, 2), ConvStatistics(3, 2, 1, 7)),
    (ConvStatistics(8, 12, 3, 2, groups=4), (4, 8), ConvStatistics(4, 4, 3, 2, groups=4)),
    # a depthwise convolution has one kind of channels
    (ConvStatistics(8, 8, 9, 5, groups=8), (0, 3), ConvStatistics(5, 5, 9, 5, groups=5)),
    (ConvStatistics(1, 1, 9, 5), (0, 0), ConvStatistics(1, 1, 9, 5)),
])
def test_statistics_of_fewer_channels(item, fewer, left):
    assert item.pruned(*fewer) == left


@pytest.mark.parametrize('layer', [
    nn.Conv2d(8, 12, (1, 3), groups=4), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 3),
    nn.ConvTranspose2d(8, 4, 3, groups=2), nn.ConvTranspose2d(8, 8, 2, groups=8),
    nn.Linear(8, 3)])
def test_weights_are_those_of_the_layer(layer):
    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, mode):
            return self.layer(x.flatten(2).mean(2) if isinstance(layer, nn.Linear) else x)

    item = record_convs(Single(), (8, 5, 6))['layer']
    assert item.weights == layer.weight.numel() == count_complexity(Single(), (8, 5, 6))[0] - len(
        layer.bias)


def test_model_is_as_before(net):
    net.norm.eval()
    mean = net.norm.running_mean.clone()
    record_convs(net, (3, 16, 16))
    assert net.training and net.conv.training and not net.norm.training
    assert torch.equal(net.norm.running_mean, mean)
    assert not any(module._forward_hooks for module in net.modules())


def test_model_is_as_before_when_it_fails(net):
    net.fail = True
    with pytest.raises(UserError, match='failed'):
        record_convs(net, (3, 16, 16))
    assert net.training and not any(module._forward_hooks for module in net.modules())


def test_linear_over_positions():
    class Tokens(nn.Linear):
        def forward(self, x, mode):
            return super().forward(x.flatten(2).transpose(1, 2))

    assert count_complexity(Tokens(3, 5), (3, 4, 6)) == (20, 24 * 15)


@pytest.mark.parametrize('name, params, macs', [
    ('yolov4_syncbn_fast_8xb16-300e_coco', 64_363_101, None),
    ('yolov4_fast_1xb64-50e_voc', 64_040_001, 29_834_335_232),
])
def test_yolov4_of_the_papers(name, params, macs):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.model.pop('data_preprocessor')
    with on_meta():
        model = build_detector(cfg)
    assert sum(param.numel() for param in model.parameters()) == params
    if macs:
        assert count_complexity(model, (3, 416, 416)) == (params, macs)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from meta_device import on_meta

from mmgcp.models import YOLOv4PAFPN

CHANNELS = dict(in_channels=[256, 512, 1024], out_channels=[128, 256, 512])


def make_inputs(channels=(256, 512, 1024), size=8, batch=1):
    return tuple(
        torch.randn(batch, number, size >> level, size >> level)
        for level, number in enumerate(channels))


def test_full_size():
    with on_meta():
        neck = YOLOv4PAFPN(**CHANNELS)
        outputs = neck(make_inputs(batch=2))
    assert [tuple(output.shape) for output in outputs] == [(2, 128, 8, 8), (2, 256, 4, 4),
                                                          (2, 512, 2, 2)]
    # 6 with the pooling, 2 lateral, 2 upwards, 2 downwards, and four blocks of 5
    assert sum(isinstance(module, nn.Conv2d) for module in neck.modules()) == 32
    acts = [module for module in neck.modules() if isinstance(module, nn.LeakyReLU)]
    assert len(acts) == 32 and all(act.negative_slope == 0.1 for act in acts)


@pytest.mark.parametrize('deepen', [0.33, 1.0])
def test_widen_factor(deepen):
    neck = YOLOv4PAFPN(**CHANNELS, widen_factor=0.125, deepen_factor=deepen)
    outputs = neck(make_inputs((32, 64, 128)))
    assert [tuple(output.shape) for output in outputs] == [(1, 16, 8, 8), (1, 32, 4, 4),
                                                          (1, 64, 2, 2)]
    assert sum(isinstance(module, nn.Conv2d) for module in neck.modules()) == 32


def test_paths(random_norms):
    """Against YOLOv4's file: what each block reads, and in which order."""
    neck = random_norms(YOLOv4PAFPN(**CHANNELS, widen_factor=0.125))
    neck.eval()
    fine, middle, coarse = inputs = make_inputs((32, 64, 128))
    expand = dict(scale_factor=2, mode='nearest')

    pooled = neck.reduce_layers[2](coarse)
    upwards = F.interpolate(neck.upsample_layers[0][0](pooled), **expand)
    middle = neck.top_down_layers[0](torch.cat((neck.reduce_layers[1](middle), upwards), 1))
    upwards = F.interpolate(neck.upsample_layers[1][0](middle), **expand)
    fine = neck.top_down_layers[1](torch.cat((neck.reduce_layers[0](fine), upwards), 1))
    downwards = neck.downsample_layers[0](fine)
    middle = neck.bottom_up_layers[0](torch.cat((downwards, middle), 1))
    downwards = neck.downsample_layers[1](middle)
    coarse = neck.bottom_up_layers[1](torch.cat((downwards, pooled), 1))

    for output, expected in zip(neck(inputs), (fine, middle, coarse)):
        torch.testing.assert_close(output, expected)


def test_freeze_all():
    neck = YOLOv4PAFPN(**CHANNELS, widen_factor=0.125, freeze_all=True)
    neck.train()
    assert not any(parameter.requires_grad for parameter in neck.parameters())
    assert not any(module.training for module in neck.modules()
                   if isinstance(module, nn.BatchNorm2d))


def test_pooling_windows():
    neck = YOLOv4PAFPN(**CHANNELS, widen_factor=0.125, spp_kernel_sizes=(3, 7))
    assert [pooling.kernel_size for pooling in neck.reduce_layers[2].poolings] == [3, 7]
    assert neck(make_inputs((32, 64, 128)))[2].shape == (1, 64, 2, 2)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from meta_device import on_meta

from mmgcp.models import YOLOv4CSPDarknet

ALL_STAGES = (0, 1, 2, 3, 4, 5)


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_size():
    with on_meta():
        backbone = YOLOv4CSPDarknet(out_indices=ALL_STAGES)
        outputs = backbone(torch.empty(2, 3, 96, 64))
    assert [tuple(output.shape) for output in outputs] == [
        (2, 32, 96, 64), (2, 64, 48, 32), (2, 128, 24, 16), (2, 256, 12, 8), (2, 512, 6, 4),
        (2, 1024, 3, 2)
    ]
    # 1 + 5 * 5 + 2 * (1 + 2 + 8 + 8 + 4) convolutions, all with Mish
    convs = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 72 and all(conv.bias is None for conv in convs)
    assert sum(isinstance(module, nn.Mish) for module in backbone.modules()) == 72


def test_default_outputs():
    outputs = YOLOv4CSPDarknet(widen_factor=0.125, deepen_factor=0.33)(torch.rand(1, 3, 64, 64))
    assert [tuple(output.shape) for output in outputs] == [(1, 32, 8, 8), (1, 64, 4, 4),
                                                          (1, 128, 2, 2)]


@pytest.mark.parametrize('deepen, numbers', [(1.0, [1, 2, 8, 8, 4]), (0.33, [1, 1, 3, 3, 1]),
                                             (0.5, [1, 1, 4, 4, 2]), (2.0, [1, 4, 16, 16, 8])])
def test_deepen_factor(deepen, numbers):
    with on_meta():
        backbone = YOLOv4CSPDarknet(deepen_factor=deepen)
    stages = [getattr(backbone, f'stage{number}') for number in range(1, 6)]
    assert [len(stage[1].blocks) for stage in stages] == numbers


@pytest.mark.parametrize('widen, channels', [(0.5, [16, 32, 64, 128, 256, 512]),
                                             (0.1875, [8, 16, 24, 48, 96, 192]),
                                             (2.0, [64, 128, 256, 512, 1024, 2048])])
def test_widen_factor(widen, channels):
    with on_meta():
        backbone = YOLOv4CSPDarknet(widen_factor=widen, out_indices=ALL_STAGES)
        outputs = backbone(torch.empty(2, 3, 32, 32))
    assert [output.shape[1] for output in outputs] == channels


def test_paths_of_the_stages():
    """The first stage does not halve its paths, but its block; the others vice versa."""
    with on_meta():
        backbone = YOLOv4CSPDarknet()
    widths = [(stage[1].main_conv.out_channels, stage[1].short_conv.out_channels,
               stage[1].blocks[0].conv1.out_channels)
              for stage in (getattr(backbone, f'stage{number}') for number in range(1, 6))]
    assert widths == [(64, 64, 32), (64, 64, 64), (128, 128, 128), (256, 256, 256),
                      (512, 512, 512)]


def test_input_channels():
    backbone = YOLOv4CSPDarknet(input_channels=1, widen_factor=0.125, out_indices=(5, ))
    outputs = backbone(torch.rand(2, 1, 32, 32))
    assert [tuple(output.shape) for output in outputs] == [(2, 128, 1, 1)]


def test_frozen_stages():
    backbone = YOLOv4CSPDarknet(widen_factor=0.125, deepen_factor=0.33, frozen_stages=2)
    backbone.train()
    for name in backbone.layers:
        frozen = name in ('stem', 'stage1', 'stage2')
        layer = getattr(backbone, name)
        assert all(parameter.requires_grad != frozen for parameter in layer.parameters())
        norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
        assert norms and all(norm.training != frozen for norm in norms)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone(torch.rand(2, 3, 64, 64))[-1].sum().backward()
    changed = {key.split('.')[0] for key, value in backbone.state_dict().items()
               if not torch.equal(value, before[key])}
    assert changed == {'stage3', 'stage4', 'stage5'}
    assert backbone.stem.conv.weight.grad is None
    assert backbone.stage3[0].conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval(norm_eval):
    backbone = YOLOv4CSPDarknet(widen_factor=0.125, deepen_factor=0.33, norm_eval=norm_eval)
    backbone.train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(norm.training != norm_eval for norm in norms)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def test_activation_and_norm_of_the_config():
    backbone = YOLOv4CSPDarknet(
        widen_factor=0.125, act_cfg=dict(type='ReLU'), norm_cfg=dict(type='BN', eps=0.5))
    kinds = {type(module) for module in backbone.modules()}
    assert nn.ReLU in kinds and nn.Mish not in kinds
    assert {module.eps for module in backbone.modules()
            if isinstance(module, nn.BatchNorm2d)} == {0.5}


def test_norms_by_default():
    """As MMYOLO's YOLOv5: epsilon 0.001 and momentum 0.03."""
    backbone = YOLOv4CSPDarknet(widen_factor=0.125)
    assert {(module.eps, module.momentum) for module in backbone.modules()
            if isinstance(module, nn.BatchNorm2d)} == {(0.001, 0.03)}


def test_parameters():
    """Counted by hand: k * k * in * out for a convolution and 2 * out for its BatchNorm."""

    def conv(channels_in, channels_out, kernel):
        return channels_in * channels_out * kernel**2 + 2 * channels_out

    total = conv(3, 32, 3)
    for c_in, c_out, path, block, number in ((32, 64, 64, 32, 1), (64, 128, 64, 64, 2),
                                             (128, 256, 128, 128, 8), (256, 512, 256, 256, 8),
                                             (512, 1024, 512, 512, 4)):
        total += conv(c_in, c_out, 3) + 2 * conv(c_out, path, 1) + conv(path, path, 1)
        total += conv(2 * path, c_out, 1)
        total += number * (conv(path, block, 1) + conv(block, path, 3))
    with on_meta():
        assert count_parameters(YOLOv4CSPDarknet()) == total

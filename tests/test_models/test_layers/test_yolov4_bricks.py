# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.config import ConfigDict

from mmgcp.models.layers import CSPDarknetLayer, SPPBlock, alternating_convs
from mmgcp.registry import MODELS

CFG = dict(norm_cfg=dict(type='BN'), act_cfg=dict(type='LeakyReLU', negative_slope=0.1))


def apply(block, x):
    """A convolution, its BatchNorm and the activation, from the parameters alone."""
    norm = block.bn
    x = F.conv2d(x, block.conv.weight, padding=block.conv.weight.shape[-1] // 2)
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    x = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    return torch.where(x > 0, x, 0.1 * x)


def test_csp_layer(random_norms):
    layer = random_norms(CSPDarknetLayer(10, 12, 6, 4, num_blocks=3, **CFG)).eval()
    x = torch.randn(2, 10, 7, 5)
    main = apply(layer.main_conv, x)
    for block in layer.blocks:
        assert block.conv1.out_channels == 4
        main = main + apply(block.conv2, apply(block.conv1, main))
    both = torch.cat((apply(layer.post_conv, main), apply(layer.short_conv, x)), 1)
    expected = apply(layer.final_conv, both)
    assert expected.shape == (2, 12, 7, 5)
    torch.testing.assert_close(layer(x), expected)


def test_spp_block(random_norms):
    block = random_norms(SPPBlock(10, 4, (5, 9, 13), **CFG)).eval()
    x = torch.randn(1, 10, 16, 15)
    small = x
    for conv in block.pre_convs:
        small = apply(conv, small)
    windows = []
    for radius in (6, 4, 2, 0):
        window = torch.empty_like(small)
        for row in range(16):
            for column in range(15):
                around = small[..., max(row - radius, 0):row + radius + 1,
                               max(column - radius, 0):column + radius + 1]
                window[..., row, column] = around.amax((-2, -1))
        windows.append(window)
    expected = torch.cat(windows, 1)
    for conv in block.post_convs:
        expected = apply(conv, expected)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize('number, shapes', [
    (1, [(4, 10, 1, 1)]),
    (3, [(4, 10, 1, 1), (8, 4, 3, 3), (4, 8, 1, 1)]),
    (5, [(4, 10, 1, 1), (8, 4, 3, 3), (4, 8, 1, 1), (8, 4, 3, 3), (4, 8, 1, 1)]),
])
def test_alternating_convs(number, shapes):
    convs = alternating_convs(10, 4, number, **CFG)
    assert [tuple(conv.conv.weight.shape) for conv in convs] == shapes
    assert convs(torch.randn(1, 10, 5, 5)).shape == (1, 4, 5, 5)


def test_mish():
    mish = MODELS.build(ConfigDict(type='mmgcp.Mish', inplace=True))
    assert isinstance(mish, nn.Mish)
    x = torch.linspace(-6, 6, 50)
    expected = x * torch.tanh(torch.log(1 + torch.exp(x)))
    torch.testing.assert_close(mish(x.clone()), expected)

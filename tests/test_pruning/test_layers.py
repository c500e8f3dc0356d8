# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Each kind of layer, reduced by hand."""
import pytest
import torch
import torch.nn as nn

from mmgcp.pruning.layers import channel_counts, keep_channels, num_channels
from mmgcp.pruning.structures import PruningError


def reduce(layer, **sides):
    """Keep channels of the sides of a layer, which is called 'layer' in a model."""
    torch.manual_seed(0)
    for param in layer.parameters():
        nn.init.normal_(param)
    weight = layer.weight.detach().clone()
    model = nn.ModuleDict(dict(layer=layer))
    for side, keep in sides.items():
        keep_channels(model, 'layer', side.rstrip('_'), torch.tensor(keep))
    return weight


def test_convolution():
    conv = nn.Conv2d(3, 5, 1)
    conv.weight.requires_grad_(False)
    weight = reduce(conv, out=[1, 4], in_=[0, 2])
    assert torch.equal(conv.weight, weight[[1, 4]][:, [0, 2]])
    assert conv.bias.shape == (2, ) and channel_counts(conv) == [2, 2]
    assert not conv.weight.requires_grad and conv.bias.requires_grad


def test_transposed_convolution():
    conv = nn.ConvTranspose2d(3, 5, 2)
    weight = reduce(conv, out=[1, 4], in_=[2])
    assert torch.equal(conv.weight, weight[[2]][:, [1, 4]])
    assert conv.bias.shape == (2, ) and channel_counts(conv) == [1, 2]


def test_linear():
    linear = nn.Linear(3, 5)
    weight = reduce(linear, in_=[0, 2], out=[3])
    assert torch.equal(linear.weight, weight[[3]][:, [0, 2]])
    assert (linear.in_features, linear.out_features) == (2, 1)


def test_depthwise_convolution():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    weight = reduce(conv, out=[0, 3])
    assert torch.equal(conv.weight, weight[[0, 3]])
    assert (conv.in_channels, conv.out_channels, conv.groups) == (2, 2, 2)
    assert conv(torch.rand(1, 2, 5, 5)).shape[1] == 2


@pytest.mark.parametrize('order', [('in_', 'out'), ('out', 'in_')])
def test_grouped_convolution(order):
    conv = nn.Conv2d(6, 8, 1, groups=2)
    keep = dict(in_=[0, 2, 4, 5], out=[1, 2, 4, 7])
    weight = reduce(conv, **{side: keep[side] for side in order})
    # the second group reads channels 3 to 5: 4 and 5 are its second and third
    expected = torch.cat((weight[[1, 2]][:, [0, 2]], weight[[4, 7]][:, [1, 2]]))
    assert torch.equal(conv.weight, expected)
    assert channel_counts(conv) == [4, 4] and conv.groups == 2
    assert conv(torch.rand(1, 4, 2, 2)).shape[1] == 4


def test_grouped_transposed_convolution():
    conv = nn.ConvTranspose2d(4, 6, 1, groups=2)
    weight = reduce(conv, out=[0, 2, 3, 4], in_=[1, 2])
    expected = torch.cat((weight[[1]][:, [0, 2]], weight[[2]][:, [0, 1]]))
    assert torch.equal(conv.weight, expected)
    assert conv(torch.rand(1, 2, 2, 2)).shape[1] == 4


def test_norm_without_scale():
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_mean += torch.arange(4)
    keep_channels(nn.ModuleDict(dict(n=norm)), 'n', 'out', torch.tensor([1, 3]))
    assert norm.running_mean.tolist() == [1, 3] and norm.num_features == 2
    assert norm.weight is None


def test_group_norm_loses_groups():
    norm = nn.GroupNorm(3, 6)
    weight = reduce(norm, out=[0, 1, 4, 5])
    assert torch.equal(norm.weight, weight[[0, 1, 4, 5]])
    assert (norm.num_groups, norm.num_channels) == (2, 4)


@pytest.mark.parametrize('shape', [(4, ), (1, 4, 1, 1)])
def test_bare_parameter(shape):
    model = nn.Module()
    model.scale = nn.Parameter(torch.arange(4.).view(shape), requires_grad=False)
    keep_channels(model, 'scale', 'out', torch.tensor([1, 3]))
    assert model.scale.flatten().tolist() == [1, 3] and model.scale.dim() == len(shape)
    assert not model.scale.requires_grad and num_channels(model.scale, 'out') == 2


def test_layer_that_cannot_be_reduced():
    with pytest.raises(PruningError, match='LayerNorm n'):
        keep_channels(nn.ModuleDict(dict(n=nn.LayerNorm(4))), 'n', 'out', torch.tensor([0]))

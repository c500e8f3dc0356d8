# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn

from mmgcp.errors import PruningError
from mmgcp.nn.layers import (
    channel_counts,
    channel_dim,
    find_layer,
    has_channels,
    is_depthwise,
    is_grouped,
    keep_channels,
    num_channels,
    spread_inputs,
    weight_by_input,
    weight_by_output,
)


def numbered(layer):
    """Give each element of each tensor of a layer its own value."""
    start = 1
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data = torch.arange(start, start + tensor.numel()).view_as(tensor).to(tensor)
        start += tensor.numel()
    return layer


def kept(layer, side, keep):
    """The layer with some of its channels, and a copy of the original."""
    model = nn.ModuleDict(dict(layer=numbered(layer)))
    original = copy.deepcopy(layer)
    keep_channels(model, 'layer', side, torch.tensor(keep))
    assert model['layer'] is layer
    return layer, original


def shapes_agree(conv):
    transposed = isinstance(conv, nn.ConvTranspose2d)
    whole, within = conv.out_channels, conv.in_channels
    if transposed:
        whole, within = within, whole
    assert conv.weight.shape[:2] == (whole, within // conv.groups)
    assert conv.bias is None or conv.bias.shape == (conv.out_channels, )
    inputs = torch.rand(2, conv.in_channels, 4, 4)
    assert conv(inputs).shape[1] == conv.out_channels


@pytest.mark.parametrize('layer, counts', [
    (nn.Conv2d(6, 4, 1), [6, 4]),
    (nn.Conv2d(6, 4, 1, groups=2), [6, 4]),
    (nn.Conv2d(6, 6, 1, groups=6), [6, 6]),
    (nn.ConvTranspose2d(6, 4, 1), [6, 4]),
    (nn.Linear(6, 4), [6, 4]),
    (nn.BatchNorm2d(5), [5]),
    (nn.SyncBatchNorm(5), [5]),
    (nn.GroupNorm(2, 6), [6]),
    (nn.Parameter(torch.zeros(1, 7, 1, 1)), [7]),
    (nn.Parameter(torch.zeros(7)), [7]),
    (nn.Parameter(torch.zeros(7, 1, 1)), [7]),
])
def test_channels_of_layers(layer, counts):
    assert channel_counts(layer) == counts
    assert [num_channels(layer, 'in'), num_channels(layer, 'out')] == [counts[0], counts[-1]]


@pytest.mark.parametrize('layer', [
    nn.Identity(), nn.Sequential(nn.Conv2d(1, 2, 1)), nn.PReLU(4), nn.LayerNorm(4),
    nn.InstanceNorm2d(4, affine=True), nn.Conv1d(2, 3, 1), nn.Parameter(torch.zeros(1)),
    nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(2, 3))])
def test_layers_without_channels_to_remove(layer):
    assert channel_counts(layer) == []


@pytest.mark.parametrize('shape, channels, dim', [
    ((4, ), True, 0), ((1, 4, 1, 1), True, 1), ((4, 1, 1), True, 0), ((1, 1, 1), False, None),
    ((), False, None), ((4, 2), False, None), ((1, 4, 8, 8), False, None)])
def test_parameters_with_channels(shape, channels, dim):
    parameter = nn.Parameter(torch.zeros(shape))
    assert has_channels(parameter) == channels
    if channels:
        assert channel_dim(parameter) == dim


@pytest.mark.parametrize('conv, depthwise, grouped', [
    (nn.Conv2d(4, 4, 1), False, False),
    (nn.Conv2d(1, 1, 1), False, False),
    (nn.Conv2d(4, 4, 1, groups=4), True, False),
    (nn.ConvTranspose2d(4, 4, 1, groups=4), True, False),
    (nn.Conv2d(4, 8, 1, groups=4), False, True),
    (nn.Conv2d(8, 4, 1, groups=4), False, True),
    (nn.Conv2d(4, 4, 1, groups=2), False, True),
    (nn.Linear(4, 4), False, False),
    (nn.GroupNorm(2, 4), False, False)])
def test_kinds_of_convolutions(conv, depthwise, grouped):
    assert (is_depthwise(conv), is_grouped(conv)) == (depthwise, grouped)


def test_find_layer():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1)), nn.BatchNorm2d(2))
    assert find_layer(model, '') is model
    assert find_layer(model, '0.0') is model[0][0]
    assert find_layer(model, '1') is model[1]
    assert find_layer(model, '0.0.bias') is model[0][0].bias


def test_convolution():
    conv, before = kept(nn.Conv2d(3, 5, 2), 'out', [1, 4])
    assert torch.equal(conv.weight, before.weight[[1, 4]])
    assert torch.equal(conv.bias, before.bias[[1, 4]])
    assert (conv.in_channels, conv.out_channels) == (3, 2)
    shapes_agree(conv)
    conv, before = kept(conv, 'in', [0, 2])
    assert torch.equal(conv.weight, before.weight[:, [0, 2]])
    assert torch.equal(conv.bias, before.bias)
    assert (conv.in_channels, conv.out_channels) == (2, 2)
    shapes_agree(conv)


def test_channels_come_in_the_given_order():
    conv, before = kept(nn.Conv2d(3, 5, 1), 'out', [4, 1])
    keep_channels(nn.Sequential(conv), '0', 'in', torch.tensor([2, 0]))
    assert torch.equal(conv.weight, before.weight[[4, 1]][:, [2, 0]])
    assert torch.equal(conv.bias, before.bias[[4, 1]])


def test_convolution_without_bias():
    conv, before = kept(nn.Conv2d(3, 5, 1, bias=False), 'out', [0])
    assert torch.equal(conv.weight, before.weight[:1]) and conv.bias is None
    assert '0.bias' not in nn.Sequential(conv).state_dict()


def test_transposed_convolution():
    conv, before = kept(nn.ConvTranspose2d(3, 5, 2), 'out', [1, 4])
    assert torch.equal(conv.weight, before.weight[:, [1, 4]])
    assert torch.equal(conv.bias, before.bias[[1, 4]])
    shapes_agree(conv)
    conv, before = kept(conv, 'in', [2])
    assert torch.equal(conv.weight, before.weight[[2]])
    assert torch.equal(conv.bias, before.bias)
    assert (conv.in_channels, conv.out_channels) == (1, 2)
    shapes_agree(conv)


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_depthwise_convolution(kind):
    conv, before = kept(kind(5, 5, 3, groups=5), 'out', [1, 2, 4])
    assert torch.equal(conv.weight, before.weight[[1, 2, 4]])
    assert torch.equal(conv.bias, before.bias[[1, 2, 4]])
    assert (conv.in_channels, conv.out_channels, conv.groups) == (3, 3, 3)
    shapes_agree(conv)


def test_grouped_convolution():
    # two groups: outputs 0 to 2 read inputs 0 to 3, outputs 3 to 5 read inputs 4 to 7
    conv, before = kept(nn.Conv2d(8, 6, 1, groups=2), 'out', [0, 2, 3, 4])
    assert torch.equal(conv.weight, before.weight[[0, 2, 3, 4]])
    assert torch.equal(conv.bias, before.bias[[0, 2, 3, 4]])
    assert (conv.in_channels, conv.out_channels, conv.groups) == (8, 4, 2)
    shapes_agree(conv)
    conv, before = kept(conv, 'in', [1, 2, 3, 4, 5, 7])
    expected = torch.cat((before.weight[:2][:, [1, 2, 3]], before.weight[2:][:, [0, 1, 3]]))
    assert torch.equal(conv.weight, expected)
    assert torch.equal(conv.bias, before.bias)
    assert (conv.in_channels, conv.out_channels, conv.groups) == (6, 4, 2)
    shapes_agree(conv)


def test_grouped_transposed_convolution():
    # two groups: inputs 0 and 1 make outputs 0 to 2, inputs 2 and 3 make outputs 3 to 5
    conv, before = kept(nn.ConvTranspose2d(4, 6, 1, groups=2), 'out', [1, 2, 3, 5])
    expected = torch.cat((before.weight[:2][:, [1, 2]], before.weight[2:][:, [0, 2]]))
    assert torch.equal(conv.weight, expected)
    assert torch.equal(conv.bias, before.bias[[1, 2, 3, 5]])
    shapes_agree(conv)
    conv, before = kept(conv, 'in', [1, 2])
    assert torch.equal(conv.weight, before.weight[[1, 2]])
    assert (conv.in_channels, conv.out_channels, conv.groups) == (2, 4, 2)
    shapes_agree(conv)


@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_grouped_convolution_computes_what_is_left(kind):
    torch.manual_seed(0)
    conv = kind(8, 6, 3, groups=2).double()
    inputs = torch.rand(1, 8, 5, 5, dtype=torch.double)
    inputs[:, [3, 6]] = 0
    expected = conv(inputs)[:, [0, 1, 3, 5]]
    model = nn.Sequential(conv)
    keep_channels(model, '0', 'in', torch.tensor([0, 1, 2, 4, 5, 7]))
    keep_channels(model, '0', 'out', torch.tensor([0, 1, 3, 5]))
    found = model(inputs[:, [0, 1, 2, 4, 5, 7]])
    assert float((found - expected).abs().max()) < 1e-12


def test_linear():
    linear, before = kept(nn.Linear(4, 3), 'out', [0, 2])
    assert torch.equal(linear.weight, before.weight[[0, 2]])
    assert torch.equal(linear.bias, before.bias[[0, 2]])
    linear, before = kept(linear, 'in', [1, 3])
    assert torch.equal(linear.weight, before.weight[:, [1, 3]])
    assert torch.equal(linear.bias, before.bias)
    assert (linear.in_features, linear.out_features) == (2, 2)
    assert linear(torch.rand(5, 2)).shape == (5, 2)


def test_batch_norm():
    norm, before = kept(nn.BatchNorm2d(5), 'out', [0, 3])
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        assert torch.equal(getattr(norm, name), getattr(before, name)[[0, 3]])
    assert norm.num_features == 2
    assert norm.num_batches_tracked == before.num_batches_tracked
    assert norm(torch.rand(2, 2, 4, 4)).shape == (2, 2, 4, 4)


def test_batch_norm_without_scale_or_statistics():
    norm, before = kept(nn.BatchNorm2d(4, affine=False), 'out', [1, 3])
    assert torch.equal(norm.running_mean, before.running_mean[[1, 3]])
    assert norm.num_features == 2 and norm.weight is None and norm.bias is None
    norm, before = kept(nn.BatchNorm1d(4, track_running_stats=False), 'out', [1, 3])
    assert torch.equal(norm.weight, before.weight[[1, 3]])
    assert norm.running_mean is None and norm.running_var is None


def test_group_norm():
    norm, before = kept(nn.GroupNorm(4, 12), 'out', [0, 1, 2, 9, 10, 11])
    assert torch.equal(norm.weight, before.weight[[0, 1, 2, 9, 10, 11]])
    assert torch.equal(norm.bias, before.bias[[0, 1, 2, 9, 10, 11]])
    assert (norm.num_groups, norm.num_channels) == (2, 6)
    inputs = torch.rand(2, 12, 4, 4)
    found = norm(inputs[:, [0, 1, 2, 9, 10, 11]])
    assert torch.allclose(found, before(inputs)[:, [0, 1, 2, 9, 10, 11]], atol=1e-5)


def test_group_norm_without_scale():
    norm, _ = kept(nn.GroupNorm(3, 6, affine=False), 'out', [2, 3])
    assert (norm.num_groups, norm.num_channels, norm.weight) == (1, 2, None)


@pytest.mark.parametrize('shape', [(6, ), (1, 6, 1, 1), (6, 1, 1)])
def test_parameter(shape):
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.scale = nn.Parameter(torch.arange(6.).view(shape), requires_grad=False)
    keep_channels(model, 'inner.scale', 'out', torch.tensor([1, 2, 5]))
    assert isinstance(model.inner.scale, nn.Parameter)
    assert not model.inner.scale.requires_grad
    assert model.inner.scale.flatten().tolist() == [1, 2, 5]
    assert model.inner.scale.shape == tuple(3 if size == 6 else 1 for size in shape)


def test_parameter_of_the_model_itself():
    model = nn.Module()
    model.scale = nn.Parameter(torch.arange(3.))
    keep_channels(model, 'scale', 'out', torch.tensor([2]))
    assert model.scale.tolist() == [2]


@pytest.mark.parametrize('layer, side, keep', [
    (nn.Conv2d(4, 4, 1), 'out', [1, 2]),
    (nn.Conv2d(4, 4, 1, groups=2), 'in', [1, 2]),
    (nn.Conv2d(4, 4, 1, groups=2), 'out', [1, 2]),
    (nn.Conv2d(4, 4, 1, groups=4), 'out', [1, 2]),
    (nn.ConvTranspose2d(4, 4, 1, groups=2), 'out', [1, 2]),
    (nn.Linear(4, 4), 'in', [1, 2]),
    (nn.BatchNorm2d(4), 'out', [1, 2]),
    (nn.GroupNorm(2, 4), 'out', [0, 1])])
def test_frozen_parameters_stay_frozen(layer, side, keep):
    layer.weight.requires_grad_(False)
    layer, _ = kept(layer, side, keep)
    assert not layer.weight.requires_grad and layer.bias.requires_grad
    assert all(param.is_leaf and param.is_contiguous() for param in layer.parameters())


def test_the_original_tensors_are_left_alone():
    conv = numbered(nn.Conv2d(3, 5, 1))
    weight, values = conv.weight, conv.weight.detach().clone()
    keep_channels(nn.Sequential(conv), '0', 'out', torch.tensor([1]))
    assert torch.equal(weight, values)
    conv.weight.data.zero_()
    assert torch.equal(weight, values)


@pytest.mark.parametrize('layer', [nn.PReLU(4), nn.LayerNorm(4), nn.InstanceNorm2d(4, affine=True),
                                   nn.Conv1d(4, 4, 1)])
def test_layers_that_cannot_be_reduced(layer):
    model = nn.Sequential(layer)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=f'of the {type(layer).__name__} 0'):
        keep_channels(model, '0', 'out', torch.tensor([0]))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


WEIGHTED = [nn.Conv2d(6, 4, (3, 2)), nn.Conv2d(6, 4, 3, groups=2), nn.Conv2d(6, 6, 3, groups=6),
            nn.ConvTranspose2d(6, 4, (3, 2)), nn.ConvTranspose2d(6, 4, 3, groups=2),
            nn.Linear(6, 4)]


def sums_of_weights(layer):
    """The sums (I, O) of the weights between each input and each output, from its outputs."""
    inputs = channel_counts(layer)[0]
    images = torch.zeros(inputs + 1, inputs, *([] if isinstance(layer, nn.Linear) else [9, 9]))
    for index in range(inputs):
        images[index, index].view(-1)[images[0, 0].numel() // 2] = 1  # meets each weight once
    outputs = layer(images)
    return (outputs[:-1] - outputs[-1:]).reshape(*outputs[:-1].shape[:2], -1).sum(2)


@pytest.mark.parametrize('layer', WEIGHTED)
def test_views_of_weights_by_channel(layer):
    inputs, outputs = channel_counts(layer)
    groups, sums = getattr(layer, 'groups', 1), sums_of_weights(layer)
    by_output, by_input = weight_by_output(layer), weight_by_input(layer)
    assert by_output.shape[:2] == (outputs, inputs // groups)
    assert by_input.shape[:2] == (inputs, outputs // groups)
    assert torch.allclose(by_output.reshape(outputs, -1).sum(1), sums.sum(0), atol=1e-5)
    assert torch.allclose(by_input.reshape(inputs, -1).sum(1), sums.sum(1), atol=1e-5)
    assert torch.equal(weight_by_input(layer, 2 * layer.weight), 2 * by_input)


@pytest.mark.parametrize('layer', WEIGHTED)
def test_values_of_inputs_are_spread_over_the_weight(layer):
    factors = torch.rand(6)
    expected = weight_by_input(layer) * factors.view(-1, *[1] * (layer.weight.dim() - 1))
    spread = spread_inputs(layer, factors)
    assert torch.equal(weight_by_input(layer, layer.weight * spread), expected)

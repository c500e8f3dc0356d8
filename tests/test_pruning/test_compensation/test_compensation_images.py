# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Offset compensation with calibration images, and the kinds of consumers."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import Block, Toy, difference, randomise, residual_toy, run

from mmgcp.errors import PruningError
from mmgcp.pruning.compensation.folding import compensate
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import remove_channels
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

SIZE = (3, 8, 8)
REMOVED = torch.tensor([1, 4])


def random_images(*counts, seed=5, size=8):
    """Batches whose channels have means of their own."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor([0.2, 0.7, 1.5]).view(3, 1, 1)
    return [torch.rand(count, 3, size, size, generator=generator) + means for count in counts]


def make_unit(**slices):
    """The unit of the channels of ``a.conv``, each of them as often as in a slice's channels."""
    items = [ChannelSlice(f'a.{name}', 'out', torch.arange(6), torch.arange(6))
             for name in ('conv', 'bn')]
    for name, (side, channels) in slices.items():
        channels = torch.arange(6).repeat_interleave(channels // 6)
        items.append(ChannelSlice(name, side, torch.arange(len(channels)), channels))
    return ChannelUnit('a.conv', 6, tuple(items))


def build(forward, a=None, **layers):
    """A double-precision toy in eval mode that begins with six channels."""
    return randomise(Toy(forward, a=a or Block(3, 6), **layers)).double().eval()


def make_constant(model, channels=REMOVED):
    model.a.bn.weight.data[channels] = 0


@torch.no_grad()
def outputs_of(model, name, images, dead=None):
    """What a layer makes of images, if some of its input channels are zero."""
    outputs, handles = [], []
    layer = model.get_submodule(name)
    if dead is not None:
        dim = -1 if isinstance(layer, nn.Linear) else 1
        handles.append(layer.register_forward_pre_hook(
            lambda _, args: (args[0].index_fill(dim, dead, 0.), )))
    watched = [module for key, module in model.named_modules() if key == f'{name}_norm'] or [layer]
    handles.append(watched[0].register_forward_hook(lambda *args: outputs.append(args[-1])))
    for image in images:
        model(image)
    for handle in handles:
        handle.remove()
    return outputs


def mean_of(outputs):
    """Mean (C, ) of outputs of several sizes over images and positions."""
    return torch.cat([output.transpose(0, 1).flatten(1) for output in outputs], 1).mean(1)


def assert_mean_is_kept(model, unit, dead=REMOVED, name='b'):
    images = random_images(2, 3)
    before = mean_of(outputs_of(model, name, images))
    assert not torch.allclose(before, mean_of(outputs_of(model, name, images, dead)), atol=1e-2)
    missed = compensate(model, [unit], {'a.conv': REMOVED}, iter(images), SIZE)
    after = mean_of(outputs_of(model, name, images, dead))
    assert missed == []
    assert torch.allclose(before, after, rtol=0, atol=1e-9)


def assert_outputs_are_kept(model, unit, dead=REMOVED, name='b', images=None):
    test_images = random_images(2, seed=9)
    before = outputs_of(model, name, test_images)
    missed = compensate(model, [unit], {'a.conv': REMOVED}, images, SIZE)
    after = outputs_of(model, name, test_images, dead)
    assert missed == []
    assert difference(before, after) < 1e-9
    assert difference(before, outputs_of(model, name, test_images)) > 1e-2


def test_bias_keeps_the_mean():
    model = build(lambda net, x: net.b(net.a(x)), b=nn.Conv2d(6, 4, 1))
    assert_mean_is_kept(model, make_unit(b=('in', 6)))


def test_norm_keeps_the_mean():
    model = build(lambda net, x: net.b_norm(net.b(net.a(x))), b=nn.Conv2d(6, 4, 1, bias=False),
                  b_norm=nn.BatchNorm2d(4))
    assert_mean_is_kept(model, make_unit(b=('in', 6)))


def test_shortcuts_keep_the_mean_after_surgery():
    model = residual_toy().double().eval()
    images = random_images(2, 2)
    before = mean_of(outputs_of(model, 'a1.bn', images))
    units, _ = find_units(model, SIZE)
    removed = {'stem.conv': torch.tensor([0, 3, 5])}
    plain = copy.deepcopy(model)
    remove_channels(plain, units, removed)
    assert compensate(model, units, removed, images, SIZE) == []
    remove_channels(model, units, removed)
    assert model.stem.conv.out_channels == 5
    assert torch.allclose(before, mean_of(outputs_of(model, 'a1.bn', images)), atol=1e-9)
    assert not torch.allclose(before, mean_of(outputs_of(plain, 'a1.bn', images)), atol=1e-2)


def test_constant_channels_are_exact_beside_others():
    # of the removed channels 1 and 4, the second one varies and has no weight
    model = build(lambda net, x: net.b(net.a(x)),
                  b=nn.Conv2d(6, 4, 3, padding=1, padding_mode='circular'))
    make_constant(model, torch.tensor([1]))
    model.b.weight.data[:, 4] = 0
    assert_outputs_are_kept(model, make_unit(b=('in', 6)), images=random_images(1, 2))


def test_channel_that_is_constant_on_noise_has_a_mean():
    # dead on noise, which is in [0, 1), but not on the images
    first = nn.Conv2d(3, 6, 1)
    model = build(lambda net, x: net.b(net.a(x)), a=nn.Sequential(), b=nn.Conv2d(6, 4, 1))
    model.a.add_module('conv', first.double())
    model.a.add_module('act', nn.ReLU())
    first.weight.data[REMOVED] = torch.tensor([0., 0., 1.]).view(3, 1, 1).double()
    first.bias.data[REMOVED] = -1.
    items = [ChannelSlice('a.conv', 'out', torch.arange(6), torch.arange(6)),
             ChannelSlice('b', 'in', torch.arange(6), torch.arange(6))]
    assert_mean_is_kept(model, ChannelUnit('a.conv', 6, tuple(items)))


def test_batches_are_weighted_by_their_size():
    images = random_images(1, 5, 2)
    streamed = build(lambda net, x: net.b(net.a(x)), b=nn.Conv2d(6, 4, 1))
    at_once = copy.deepcopy(streamed)
    for model, batches in ((streamed, images), (at_once, [torch.cat(images)])):
        compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED}, batches, SIZE)
    assert torch.allclose(streamed.b.bias, at_once.b.bias, rtol=0, atol=1e-12)


def test_images_are_weighted_by_their_positions():
    model = build(lambda net, x: net.b(net.a(x)), b=nn.Conv2d(6, 4, 1))
    bias, images = model.b.bias.detach().clone(), random_images(1) + random_images(1, size=16)
    with torch.no_grad():
        means = [model.a(image.double()).mean((0, 2, 3)) for image in images]
    expected = model.b.weight[:, REMOVED, 0, 0] @ (means[0] * 0.2 + means[1] * 0.8)[REMOVED]
    compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED}, images, SIZE)
    assert torch.allclose(model.b.bias, bias + expected)


def test_shared_layer_keeps_the_mean_of_all_its_calls():
    model = build(lambda net, x: [net.b(net.a(x)), net.b(3 * F.max_pool2d(net.a(x), 2))],
                  b=nn.Conv2d(6, 4, 1))
    assert_mean_is_kept(model, make_unit(b=('in', 6)))


def separate_norms(net, x):
    return [norm(net.b(scale * net.a(x))) for norm, scale in zip((net.first, net.second), (1, 3))]


def test_shared_layer_with_norms_of_each_call():
    model = build(separate_norms, b=nn.Conv2d(6, 4, 1, bias=False), first=nn.BatchNorm2d(4),
                  second=nn.BatchNorm2d(4))
    make_constant(model)
    image = random_images(2)[0]
    with torch.no_grad():
        before = model(image)
    assert compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED},
                      input_shape=SIZE) == []
    model.b.weight.data[:, REMOVED] = 0
    assert difference(before, model(image)) < 1e-9


@pytest.mark.parametrize('both', [True, False])
def test_norm_of_two_layers_is_left_alone(both):
    model = build(lambda net, x: [net.norm(net.b(net.a(x))),
                                  net.norm(net.c(net.a(x) if both else x))],
                  b=nn.Conv2d(6, 4, 1), c=nn.Conv2d(6 if both else 3, 4, 1),
                  norm=nn.BatchNorm2d(4))
    make_constant(model)
    mean = model.norm.running_mean.clone()
    slices = dict.fromkeys('bc' if both else 'b', ('in', 6))
    assert_outputs_are_kept(model, make_unit(**slices))
    assert torch.equal(mean, model.norm.running_mean)


def test_norm_behind_an_activation_in_place_is_left_alone():
    model = build(lambda net, x: net.norm(F.relu(net.b(net.a(x)), inplace=True)),
                  b=nn.Conv2d(6, 4, 1), norm=nn.BatchNorm2d(4))
    make_constant(model)
    before = model(random_images(2)[0])
    assert compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED},
                      input_shape=SIZE) == []
    model.b.weight.data[:, REMOVED] = 0
    assert torch.allclose(before, model(random_images(2)[0]))


def test_norm_without_statistics_takes_offsets_away():
    model = build(lambda net, x: net.b_norm(net.b(net.a(x))), b=nn.Conv2d(6, 4, 1, bias=False))
    model.b_norm = nn.BatchNorm2d(4, track_running_stats=False).double().eval()
    make_constant(model)
    image = random_images(2)
    before = outputs_of(model, 'b', image)
    assert compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED},
                      input_shape=SIZE) == []
    assert difference(before, outputs_of(model, 'b', image, REMOVED)) < 1e-9


@pytest.mark.parametrize('bias', [True, False])
def test_group_norm_behind_a_consumer(bias):
    model = build(lambda net, x: net.norm(net.b(net.a(x))), b=nn.Conv2d(6, 4, 1, bias=bias),
                  norm=nn.GroupNorm(2, 4))
    make_constant(model)
    if bias:
        assert_outputs_are_kept(model, make_unit(b=('in', 6)))
    else:
        state = copy.deepcopy(model.state_dict())
        assert compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED},
                          random_images(1), SIZE) == ['b']
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('groups', [2, 3])
def test_grouped_consumer(groups):
    model = build(lambda net, x: net.b(net.a(x)), b=nn.Conv2d(6, 12, 1, groups=groups))
    assert_mean_is_kept(copy.deepcopy(model), make_unit(b=('in', 6)))
    make_constant(model)
    assert_outputs_are_kept(model, make_unit(b=('in', 6)))


def test_depthwise_convolution_passes_channels_through():
    model = build(lambda net, x: net.b(torch.sigmoid(net.norm(net.depthwise(net.a(x))))),
                  depthwise=nn.Conv2d(6, 6, 1, groups=6, bias=False), norm=nn.BatchNorm2d(6),
                  b=nn.Conv2d(6, 4, 1))
    unit = make_unit(depthwise=('out', 6), norm=('out', 6), b=('in', 6))
    mean = model.norm.running_mean.clone()
    assert_mean_is_kept(copy.deepcopy(model), unit)
    make_constant(model)
    assert_outputs_are_kept(model, unit)
    assert torch.equal(mean, model.norm.running_mean)


def test_parameters_and_group_norms_among_the_slices():
    model = build(lambda net, x: net.b(net.norm(net.a(x)) + net.implicit),
                  norm=nn.GroupNorm(6, 6), b=nn.Conv2d(6, 4, 1))
    model.implicit = nn.Parameter(torch.randn(1, 6, 1, 1, dtype=torch.float64))
    unit = make_unit(norm=('out', 6), implicit=('out', 6), b=('in', 6))
    assert_mean_is_kept(copy.deepcopy(model), unit)
    make_constant(model)
    assert_outputs_are_kept(model, unit)


@pytest.mark.parametrize('layer', [nn.Linear, nn.Conv2d])
def test_flattened_channels(layer):
    """An input of the second part is a position of a channel."""
    def forward(net, x):
        x = F.adaptive_avg_pool2d(net.a(x), 2).flatten(1)
        return net.b(x if layer is nn.Linear else x[:, :, None, None])

    model = build(forward, b=layer(24, 5, *([] if layer is nn.Linear else [1])))
    dead = torch.tensor([4, 5, 6, 7, 16, 17, 18, 19])
    assert_mean_is_kept(copy.deepcopy(model), make_unit(b=('in', 24)), dead)
    make_constant(model)
    assert_outputs_are_kept(model, make_unit(b=('in', 24)), dead)


def test_linear_layer_over_positions():
    # as in a transformer, with the channels in the last of four dimensions
    model = build(lambda net, x: net.b(net.a(x).permute(0, 2, 3, 1)), b=nn.Linear(6, 4))
    make_constant(model)
    assert_outputs_are_kept(model, make_unit(b=('in', 6)))


@pytest.mark.parametrize('options', [
    dict(kernel_size=2, stride=2),
    dict(kernel_size=3, stride=3, groups=2),
    dict(kernel_size=1, stride=1),
    dict(kernel_size=(2, 3), stride=(2, 3), bias=False),
])
def test_transposed_convolution_keeps_the_mean(options):
    model = build(lambda net, x: net.b_norm(net.b(net.a(x))), b=nn.ConvTranspose2d(6, 4, **options),
                  b_norm=nn.BatchNorm2d(4))
    assert_mean_is_kept(model, make_unit(b=('in', 6)))


@pytest.mark.parametrize('dilation, same', [(1, True), (1, False), (2, True)])
def test_transposed_convolution_with_constant_inputs(dilation, same):
    model = build(lambda net, x: net.b(net.a(x)),
                  b=nn.ConvTranspose2d(6, 4, 4, 2, 1, dilation=dilation))
    make_constant(model)
    if same:
        model.b.weight.data[:] = model.b.weight.data[:, :, :1, :1]
    before = outputs_of(model, 'b', random_images(2))[0]
    missed = compensate(model, [make_unit(b=('in', 6))], {'a.conv': REMOVED}, input_shape=SIZE)
    error = (outputs_of(model, 'b', random_images(2), REMOVED)[0] - before)[..., 6:10, 6:10]
    # with a dilation of 2, every second output gets nothing
    exact = same and dilation == 1
    assert missed == ([] if exact else ['b'])
    assert (error.abs().max() < 1e-9) == exact
    assert error.mean((0, 2, 3)).abs().max() < 1e-9


def test_without_images_the_shifts_count():
    model = build(lambda net, x: net.b(net.a(x)), b=nn.Conv2d(6, 4, 1))
    bias, weight = model.b.bias.detach().clone(), model.b.weight[:, REMOVED, 0, 0]
    constants = F.leaky_relu(model.a.bn.bias[REMOVED])
    unit, removed = [make_unit(b=('in', 6))], {'a.conv': REMOVED}
    assert compensate(model, unit, removed, input_shape=SIZE) == []
    assert torch.allclose(model.b.bias, bias + weight @ constants)


def test_images_that_have_been_used_up():
    model, images = residual_toy(), iter(random_images(1))
    units, _ = find_units(model, SIZE)
    removed = {'stem.conv': torch.tensor([0, 3])}
    compensate(model, units, removed, images, SIZE)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match='there are no images to calibrate with'):
        compensate(model, units, removed, images, SIZE)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_images_explain_what_scales_cannot():
    # a layer without scales is added: its channels cannot be made constant
    model = build(lambda net, x: net.b(net.a(x) + net.raw(x)), raw=nn.Conv2d(3, 6, 1),
                  b=nn.Conv2d(6, 4, 1))
    unit = make_unit(raw=('out', 6), b=('in', 6))
    assert compensate(copy.deepcopy(model), [unit], {'a.conv': REMOVED},
                      input_shape=SIZE) == ['b']
    assert_mean_is_kept(model, unit)


def test_nothing_removed_needs_no_image():
    def fail():
        raise AssertionError('no image is needed')
        yield

    model = residual_toy()
    units, _ = find_units(model, SIZE)
    assert compensate(model, units, {}, fail()) == []


def test_scales_and_modes_stay():
    model = residual_toy()
    model.a1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    units, _ = find_units(model, SIZE)
    before, removed = copy.deepcopy(model.state_dict()), {'stem.conv': torch.tensor([0, 3])}
    compensate(model, units, removed, random_images(1), SIZE)
    assert modes == {name: module.training for name, module in model.named_modules()}
    changed = {name for name, value in model.state_dict().items()
               if not torch.equal(value, before[name])}
    assert changed == {'a1.bn.running_mean', 'a2.bn.running_mean', 'pred.bias'}
    assert len(run(model, 8)) == 1

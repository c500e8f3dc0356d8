# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_samples import (
    Block,
    RandomNet,
    Toy,
    choose,
    difference,
    randomise,
    residual_toy,
    run,
    set_channels,
    tensors,
)

from mmgcp.pruning.compensation.folding import compensate
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import remove_channels

SIZE = (3, 16, 16)
OPS = st.lists(
    st.tuples(st.sampled_from(['conv', 'add', 'cat', 'repeat', 'pool', 'up']),
              st.integers(0, 9), st.integers(0, 9), st.integers(2, 6)),
    min_size=1, max_size=7)


def prune(model, removed=None, seed=0, size=SIZE):
    """Zero the scales of channels, prune with compensation.

    Returns the outputs before, after, and after without compensation, and the layers
    that could not absorb everything.
    """
    units, _ = find_units(model, size)
    removed = choose(units, seed) if removed is None else removed
    model = set_channels(model, units, removed, shift=None).double()
    expected = run(model, size[1])
    plain = copy.deepcopy(model)
    remove_channels(plain, units, removed)
    missed = compensate(model, units, removed, input_shape=size)
    remove_channels(model, units, removed)
    return expected, run(model, size[1]), run(plain, size[1]), missed


def assert_equal(model, removed=None, **kwargs):
    expected, after, plain, missed = prune(model, removed, **kwargs)
    assert missed == []
    assert difference(expected, after) < 1e-9
    return difference(expected, plain)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ops=OPS, seed=st.integers(0, 99), act=st.sampled_from([nn.LeakyReLU, nn.Mish, nn.Sigmoid]))
def test_random_networks_of_1x1_convolutions(ops, seed, act):
    assert_equal(randomise(RandomNet(ops, 1, act), seed), seed=seed)


def test_shortcut_sums():
    removed = {'stem.conv': torch.tensor([1, 2, 7]), 'a2.conv': torch.tensor([0])}
    assert assert_equal(residual_toy(), removed) > 1e-5


def test_concatenation_pooling_and_upsampling():
    def forward(net, x):
        a, b = net.a(x), net.b(x)
        b = F.interpolate(F.max_pool2d(b, 2), scale_factor=2)
        return net.pred(net.c(torch.cat((a, F.max_pool2d(a, 5, 1, 2), b), 1)))

    model = randomise(Toy(forward, a=Block(3, 4), b=Block(3, 3), c=Block(11, 4),
                          pred=nn.Conv2d(4, 2, 1)))
    removed = {'a.conv': torch.tensor([0, 3]), 'b.conv': torch.tensor([1])}
    assert assert_equal(model, removed) > 1e-5


def test_prediction_bias_takes_the_constant():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x)), a=Block(3, 3, act=nn.Mish),
                          pred=nn.Conv2d(3, 2, 1)))
    bias, weight = model.pred.bias.detach().clone(), model.pred.weight.detach().clone()
    constant = F.mish(model.a.bn.bias[1]).detach()
    assert_equal(model, {'a.conv': torch.tensor([1])})
    assert torch.allclose(model.pred.bias, (bias + weight[:, 1, 0, 0] * constant).double())


def test_norm_takes_the_constant():
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 3), b=Block(3, 4),
                          pred=nn.Conv2d(4, 2, 1)))
    mean, bias = model.b.bn.running_mean.clone(), model.b.bn.bias.detach().clone()
    constant = F.leaky_relu(model.a.bn.bias[2]).detach()
    expected = mean - model.b.conv.weight[:, 2, 0, 0].detach() * constant
    assert_equal(model, {'a.conv': torch.tensor([2])})
    assert torch.allclose(model.b.bn.running_mean, expected.double())
    assert torch.equal(model.b.bn.bias.float(), bias)


def test_linear_consumer():
    model = randomise(Toy(
        lambda net, x: net.pred(F.adaptive_avg_pool2d(net.a(x), 1).flatten(1)),
        a=Block(3, 4), pred=nn.Linear(4, 2)))
    assert assert_equal(model, {'a.conv': torch.tensor([0, 2])}) > 1e-5


def test_padding_leaves_a_difference_at_the_border_only():
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 4, 1),
                          b=Block(4, 4, 3), pred=nn.Conv2d(4, 2, 1)))
    expected, after, plain, missed = prune(model, {'a.conv': torch.tensor([0, 1])})
    error = (expected[0] - after[0]).abs()
    assert missed == []
    assert error[..., 1:-1, 1:-1].max() < 1e-9
    assert error.max() > 1e-6
    assert (expected[0] - plain[0])[..., 1:-1, 1:-1].abs().max() > 1e-5


def test_yolov4_inside(model, units):
    removed = choose(units, 5, share=0.5)
    set_channels(model, units, removed, shift=None)
    expected, plain = run(model, 320), copy.deepcopy(model)
    remove_channels(plain, units, removed)
    assert compensate(model, units, removed) == []
    remove_channels(model, units, removed)
    closer = [float((a - b).abs().mean() / (a - c).abs().mean())
              for a, b, c in zip(expected, run(model, 320), run(plain, 320))]
    assert max(closer) < 0.7


def test_consumer_with_neither_norm_nor_bias():
    model = randomise(Toy(
        lambda net, x: net.pred(F.leaky_relu(net.raw(net.a(x)))),
        a=Block(3, 4), raw=nn.Conv2d(4, 3, 1, bias=False), pred=nn.Conv2d(3, 2, 1)))
    assert prune(model, {'a.conv': torch.tensor([1])})[-1] == ['raw']


def test_transposed_convolution_is_reported():
    model = randomise(Toy(lambda net, x: net.pred(net.up(net.a(x))), a=Block(3, 4),
                          up=nn.ConvTranspose2d(4, 3, 2, 2), pred=nn.Conv2d(3, 2, 1)))
    assert prune(model, {'a.conv': torch.tensor([1])})[-1] == ['up']


def test_input_that_is_not_constant_is_reported():
    # a layer without scales is added: its channels cannot be made constant
    model = randomise(Toy(lambda net, x: net.pred(net.a(x) + net.raw(x)), a=Block(3, 4),
                          raw=nn.Conv2d(3, 4, 1), pred=nn.Conv2d(4, 2, 1)))
    assert prune(model, {'a.conv': torch.tensor([1])})[-1] == ['pred']


def test_only_means_and_biases_change(model, units):
    model.train()
    model.neck.eval()
    before, removed = copy.deepcopy(model.state_dict()), choose(units, 6)
    modes = {name: module.training for name, module in model.named_modules()}
    compensate(model, units, removed)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())
    changed = {name for name, value in model.state_dict().items()
               if not torch.equal(value, before[name])}
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    preds = {f'bbox_head.head_module.convs_pred.{level}.bias' for level in range(3)}
    assert changed <= {f'{name}.running_mean' for name in norms} | preds
    assert changed & preds and len(changed) > 10


def test_weights_are_restored_when_the_model_fails():
    model = residual_toy()
    units, _ = find_units(model, SIZE)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        compensate(model, units, choose(units, 1),
                   input_shape=(4, 16, 16))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())


def test_layer_that_runs_twice_with_the_same_constant():
    model = randomise(Toy(
        lambda net, x: [net.pred(net.a(x)), net.pred(F.max_pool2d(net.a(x), 2))],
        a=Block(3, 4), pred=nn.Conv2d(4, 2, 1)))
    assert assert_equal(model, {'a.conv': torch.tensor([1])}) > 1e-3


def test_shared_layer_with_other_constants_is_reported():
    model = randomise(Toy(
        lambda net, x: [net.pred(net.a(x)), net.pred(net.a(x) * 3)],
        a=Block(3, 4), pred=nn.Conv2d(4, 2, 1)))
    model.a.bn.bias.data[1] = 1.
    assert prune(model, {'a.conv': torch.tensor([1])})[-1] == ['pred']


def test_nothing_removed():
    model = residual_toy()
    units, _ = find_units(model, SIZE)
    state = copy.deepcopy(model.state_dict())
    assert compensate(model, units, {}) == []
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(tensors(run(model, 16))) == 1

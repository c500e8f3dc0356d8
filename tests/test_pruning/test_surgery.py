# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmyolo.models.layers import RepVGGBlock
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
)
from yolov4_samples import batch

from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import gather_channels, remove_channels
from mmgcp.pruning.units import ChannelSlice, ChannelUnit

OPS = st.lists(
    st.tuples(st.sampled_from(['conv', 'add', 'cat', 'repeat', 'pool', 'up']),
              st.integers(0, 9), st.integers(0, 9), st.integers(2, 6)),
    min_size=1, max_size=8)


def assert_exact(model, units, removed, size):
    expected = run(set_channels(copy.deepcopy(model), units, removed), size)
    before = run(model, size)
    remove_channels(model, units, removed)
    assert difference(run(model, size), expected) < 1e-9
    return difference(before, expected)


@pytest.mark.parametrize('seed', range(4))
def test_yolov4_equals_the_original_with_channels_at_zero(model, units, seed):
    removed = choose(units, seed, share=0.8)
    # the channels matter: zeroing them is no empty statement
    assert assert_exact(model, units, removed, 64) > 1e-3


@settings(max_examples=40, deadline=None, derandomize=True)
@given(ops=OPS, seed=st.integers(0, 99))
def test_random_networks(ops, seed):
    model = randomise(RandomNet(ops), seed)
    units, skipped = find_units(model, (3, 16, 16))
    assert {name for name in skipped if name.startswith('preds')} == {
        f'preds.{index}' for index in range(len(model.preds))}
    # every convolution is in a unit or has a reason
    named = {item.module for unit in units for item in unit.side('out')}
    assert named | set(skipped) >= {
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert_exact(model, units, choose(units, seed), 16)


@pytest.mark.parametrize('seed', range(3))
def test_linear_behind_flatten(seed):
    model = randomise(Toy(
        lambda net, x: net.pred(net.hidden(net.b(net.a(x)).flatten(1))),
        a=Block(3, 6), b=Block(6, 4), hidden=nn.Linear(4 * 64, 7), pred=nn.Linear(7, 2)), seed)
    units, _ = find_units(model, (3, 8, 8))
    removed = {'a.conv': torch.tensor([1, 5]), 'b.conv': torch.tensor([0, 2, 3])}
    assert assert_exact(model, units, removed, 8) > 1e-3
    assert model.hidden.weight.shape == (7, 64)


def test_transposed_convolution():
    up = nn.ConvTranspose2d(6, 5, 2, 2)
    model = randomise(Toy(lambda net, x: net.pred(F.leaky_relu(net.bn(net.up(net.a(x))))),
                          a=Block(3, 6), up=up, bn=nn.BatchNorm2d(5), pred=nn.Conv2d(5, 2, 1)))
    units, _ = find_units(model, (3, 8, 8))
    removed = {'a.conv': torch.tensor([1, 4]), 'up': torch.tensor([0])}
    assert assert_exact(model, units, removed, 8) > 1e-3
    assert (up.in_channels, up.out_channels, *up.weight.shape[:2]) == (4, 4, 4, 4)


def test_attributes_tell_the_truth(model, units):
    remove_channels(model, units, choose(units, 1))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)
            assert module.bias is None or len(module.bias) == module.out_channels
        elif isinstance(module, nn.BatchNorm2d):
            assert {module.num_features} == {
                len(getattr(module, name))
                for name in ('weight', 'bias', 'running_mean', 'running_var')}


def test_keeps_requires_grad_and_mode(model, units):
    for name, param in model.named_parameters():
        param.requires_grad_('stage2' not in name)
    model.train()
    model.neck.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    remove_channels(model, units, choose(units, 2))
    for name, param in model.named_parameters():
        assert isinstance(param, nn.Parameter)
        assert param.requires_grad == ('stage2' not in name)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2


def test_pruned_yolov4_trains(model, units):
    before = sum(param.numel() for param in model.parameters())
    remove_channels(model, units, choose(units, 3))
    assert sum(param.numel() for param in model.parameters()) < 0.7 * before
    model.train()
    losses = model(**model.data_preprocessor(batch(), True), mode='loss')
    sum(losses.values()).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None and param.grad.isfinite().all(), name
        assert param.grad.abs().sum() > 0, name


def test_no_channels_changes_nothing(model, units):
    state = copy.deepcopy(model.state_dict())
    remove_channels(model, units, {})
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def piece(module, side, channels, unit_index):
    return ChannelSlice(module, side, torch.tensor(channels), torch.tensor(unit_index))


def test_gather_channels_by_hand():
    units = [
        ChannelUnit('a', 3, (piece('a', 'out', [0, 1, 2], [0, 1, 2]),
                                 piece('c', 'in', [4, 5, 6, 7, 8, 9], [0, 1, 2, 0, 1, 2]))),
        ChannelUnit('b', 2, (piece('b', 'out', [3, 5], [0, 1]),
                                 piece('c', 'in', [2, 3], [0, 1]))),
        ChannelUnit('d', 2, (piece('d', 'out', [0, 1], [0, 1]), )),
    ]
    found = gather_channels(units, {'a': torch.tensor([0, 2]), 'b': torch.tensor([1])})
    assert {key: sorted(value.tolist()) for key, value in found.items()} == {
        ('a', 'out'): [0, 2], ('b', 'out'): [5], ('c', 'in'): [3, 4, 6, 7, 9]}


def test_residual_chain_by_hand():
    model = residual_toy(3)
    units, _ = find_units(model, (3, 16, 16))
    weight = model.a2.conv.weight.detach().clone()
    removed = {'stem.conv': torch.tensor([0, 6]), 'a2.conv': torch.tensor([5])}
    assert_exact(model, units, removed, 16)
    assert torch.equal(model.a2.conv.weight, weight[:5][:, [1, 2, 3, 4, 5, 7]])


def test_repeated_concatenation_of_a_concatenation():
    def forward(net, x):
        x = net.a(x)
        x = torch.cat((x, x), 1)
        return net.pred(torch.cat((x, x, F.max_pool2d(x, 3, 1, 1)), 1))

    model = randomise(Toy(forward, a=Block(3, 4), pred=nn.Conv2d(24, 2, 1)))
    units, skipped = find_units(model, (3, 16, 16))
    assert list(skipped) == ['pred']
    assert assert_exact(model, units, {'a.conv': torch.tensor([1])}, 16) > 1e-3


class Mixed(nn.Module):
    """Layers of all kinds, whose weights are numbered."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.depth = nn.Conv2d(4, 4, 1, groups=4)
        self.scale = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.grouped = nn.Conv2d(8, 4, 1, groups=2)
        self.linear = nn.Linear(8, 2)
        for param in self.parameters():
            param.data = torch.arange(param.numel()).view_as(param).float()


def test_remove_channels_by_hand():
    model = Mixed()
    before = copy.deepcopy(model.state_dict())
    model.depth.bias.requires_grad_(False)
    model.scale.requires_grad_(False)
    model.norm.eval()
    every = [0, 1, 2, 3], [0, 1, 2, 3]
    units = [
        ChannelUnit('conv', 4, (
            *(piece(name, 'out', *every) for name in ('conv', 'norm', 'depth', 'scale')),
            # it reads all channels twice, in another order
            piece('grouped', 'in', [0, 1, 2, 3, 4, 5, 6, 7], [3, 2, 1, 0, 0, 1, 2, 3]),
            piece('linear', 'in', [6, 4, 2, 0], [0, 1, 2, 3]))),
        ChannelUnit('grouped', 4, (piece('grouped', 'out', *every), )),
        ChannelUnit('linear', 2, (piece('linear', 'out', [0, 1], [0, 1]), ))]
    removed = {'conv': torch.tensor([0, 1]), 'grouped': torch.tensor([1, 2])}
    remove_channels(model, units, removed)
    expected = {
        'conv.weight': before['conv.weight'][2:],
        'norm.weight': before['norm.weight'][2:],
        'norm.bias': before['norm.bias'][2:],
        'depth.weight': before['depth.weight'][2:],
        'depth.bias': before['depth.bias'][2:],
        'scale': before['scale'][:, 2:],
        # inputs 2 and 3 of the first group and 4 and 5, the first of the second
        'grouped.weight': torch.stack((before['grouped.weight'][0, :2],
                                       before['grouped.weight'][3, 2:])),
        'grouped.bias': before['grouped.bias'][[0, 3]],
        'linear.weight': before['linear.weight'][:, [0, 1, 2, 3, 5, 7]],
        'linear.bias': before['linear.bias']}
    assert set(model.state_dict()) == set(expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert {name for name, param in model.named_parameters() if not param.requires_grad} == {
        'depth.bias', 'scale'}
    assert (model.norm.num_groups, model.depth.groups, model.grouped.groups) == (1, 2, 2)
    assert not model.norm.training and model.depth.training


def test_attributes_follow():
    block = RepVGGBlock(4, 6)
    units = [ChannelUnit('0.rbr_dense.conv', 6, tuple(
        piece(f'0.rbr_{branch}.{layer}', 'out', range(6), range(6))
        for branch in ('dense', '1x1') for layer in ('conv', 'bn')))]
    remove_channels(nn.Sequential(block), units, {'0.rbr_dense.conv': torch.tensor([2, 5])})
    assert (block.in_channels, block.out_channels) == (4, 4)


@pytest.mark.parametrize('split', ['chunk', 'slice', 'split'])
def test_parts_of_a_layer(split):
    """A module that does not say how it splits is left alone."""
    def forward(net, x):
        x = net.a(x)
        first, second = dict(chunk=lambda: x.chunk(2, 1), split=lambda: x.split((2, 2), 1),
                             slice=lambda: (x[:, :2], x[:, 2:]))[split]()
        return net.pred(torch.cat((first, second, net.b(second)), 1))

    model = randomise(Toy(forward, a=Block(3, 4), b=Block(2, 2), pred=nn.Conv2d(6, 2, 1)))
    units, skipped = find_units(model, (3, 16, 16))
    assert 'split by a module' in skipped['a.conv']
    assert [unit.name for unit in units] == ['b.conv']
    assert assert_exact(model, units, {'b.conv': torch.tensor([0])}, 16) > 1e-4

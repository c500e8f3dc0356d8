# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import Block, Toy, difference, randomise, run

from mmgcp.attention.scale_folding import find_read_blocks, fold_scales
from mmgcp.pruning.graph import find_units

SHAPE = (3, 32, 32)


def scaled_copy(model, factors):
    """A copy whose blocks multiply their output channels by factors."""
    model = copy.deepcopy(model)
    for name, values in factors.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, values=values: output * values[:, None, None])
    return model


def check(model, blocks, size=16):
    """Folding is exact, and changes nothing in place."""
    generator = torch.Generator().manual_seed(2)
    units, _ = find_units(model, SHAPE)
    factors, energies = {}, {}
    for name in blocks:
        channels = model.get_submodule(name).bn.num_features
        factors[name] = 0.2 + torch.rand(channels, generator=generator, dtype=torch.double)
        energies[name] = 0.5 + torch.rand(channels, generator=generator, dtype=torch.double)
    before = {name: (param, param.detach().clone()) for name, param in model.named_parameters()}
    expected = run(scaled_copy(model, factors), size)
    assert difference(run(model, size), expected) > 1e-2
    fold_scales(model.double(), units, {name: f'{name}.conv' for name in blocks},
                {name: factors[name] * energies[name] for name in blocks}, energies, SHAPE)
    assert difference(run(model, size), expected) < 1e-9
    changed = {name for name, param in model.named_parameters() if param is not before[name][0]}
    assert all(torch.equal(before[name][0].float(), before[name][1]) for name in changed)
    return changed


@pytest.mark.parametrize('reader', [
    nn.Conv2d(8, 5, 3), nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(8, 5, 2, 2)])
def test_readers(reader):
    model = randomise(Toy(lambda net, x: net.pred(net.read(net.a(x))), a=Block(3, 8, act=nn.SiLU),
                          read=reader, pred=nn.Conv2d(reader.out_channels, 2, 1)))
    assert check(model, ['a']) == {'read.weight'}


def test_linear_reader():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x).flatten(2).mean(2)),
                          a=Block(3, 8, act=nn.SiLU), pred=nn.Linear(8, 2)))
    assert check(model, ['a']) == {'pred.weight'}


def test_depthwise_convolution_and_what_reads_it():
    """Only the first of them gets the factor, because an activation follows it."""
    depth = Block(8, 8, act=nn.SiLU)
    depth.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    model = randomise(Toy(lambda net, x: net.pred(net.depth(net.a(x))), a=Block(3, 8), depth=depth,
                          pred=nn.Conv2d(8, 2, 1)))
    assert check(model, ['a']) == {'depth.conv.weight'}


def test_norm_that_reads_a_block():
    """As in the branch without convolution of a RepVGG block."""
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x)) + net.norm(net.a(x))),
                          a=Block(3, 8, act=nn.SiLU), b=Block(8, 8, 3), norm=nn.BatchNorm2d(8),
                          pred=nn.Conv2d(8, 2, 1)))
    assert check(model, ['a']) == {'b.conv.weight', 'norm.weight', 'norm.bias'}


def test_pooling_upsampling_and_concatenation():
    def forward(net, x):
        a, b = net.a(x), net.b(x)
        parts = (F.max_pool2d(a, 5, 1, 2), F.interpolate(F.avg_pool2d(b, 2), scale_factor=2.), a)
        return net.pred(torch.cat(parts, 1))

    model = randomise(Toy(forward, a=Block(3, 4, act=nn.SiLU), b=Block(3, 6, act=nn.Mish),
                          pred=nn.Conv2d(14, 2, 1)))
    assert check(model, ['a', 'b']) == {'pred.weight'}


def test_sum_gets_the_mean_by_energy():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x) + net.b(x)), a=Block(3, 2),
                          b=Block(3, 2), pred=nn.Conv2d(2, 1, 1)))
    units, _ = find_units(model, SHAPE)
    weight = model.pred.weight.detach().clone().flatten()
    energies = dict(a=torch.tensor([3., 0.]).double(), b=torch.tensor([1., 0.]).double())
    scaled = dict(a=torch.tensor([.5, 0.]).double() * 3, b=torch.tensor([.9, 0.]).double())
    fold_scales(model, units, dict(a='a.conv', b='b.conv'), scaled, energies, SHAPE)
    # the second channel is always zero, so that no factor is known
    factors = torch.tensor([(3 * .5 + .9) / 4, 1.])
    assert torch.allclose(model.pred.weight.flatten(), weight * factors)


def test_block_that_was_not_measured():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x)), a=Block(3, 2),
                          pred=nn.Conv2d(2, 1, 1)))
    units, _ = find_units(model, SHAPE)
    weight = model.pred.weight.detach().clone()
    fold_scales(model, units, dict(a='a.conv'), {}, {}, SHAPE)
    assert torch.equal(model.pred.weight, weight)


def test_read_blocks():
    """The nearest blocks, through sums but not through other layers."""
    def forward(net, x):
        a = net.a(x)
        b = net.b(a)
        return net.pred(a + b), net.c(net.other(b))

    model = randomise(Toy(forward, a=Block(3, 4), b=Block(4, 4), other=nn.Conv2d(4, 4, 1),
                          c=Block(4, 2), pred=nn.Conv2d(4, 1, 1)))
    found = find_read_blocks(model, ['a', 'b'], SHAPE)
    assert {name: blocks for name, blocks in found.items() if blocks} == {
        'b.conv': {'a'}, 'other': {'b'}, 'pred': {'a', 'b'}}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in
                   model.modules())

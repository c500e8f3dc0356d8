# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What Torch-Pruning 1.6.1 gets wrong, and that the repairs are right.

If a test fails because Torch-Pruning has become right, the repair can go.
"""
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch_pruning
from pruning_samples import Block, Toy
from torch_pruning._helpers import _HybridIndex as Index
from torch_pruning.dependency.index_mapping import _FlattenIndexMapping

from mmgcp.errors import PruningError
from mmgcp.pruning.dependencies import ChannelGraph, OrderedFlattening
from mmgcp.pruning.graph import find_units

SIZE = (3, 8, 8)


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 1)


def num_outputs(layer):
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def repaired(model, name, size=SIZE):
    """Pairs of a channel and its index in the unit, by layer and side."""
    layer = model.get_submodule(name)
    reached = ChannelGraph(model, size).follow(layer, range(num_outputs(layer)))
    return {key: list(pairs) for key, pairs in reached.items()}


def unrepaired(model, name, size=SIZE):
    """The same of Torch-Pruning itself."""
    layer, graph = model.get_submodule(name), torch_pruning.DependencyGraph()
    graph.build_dependency(model, torch.rand(1, *size), lambda net, x: net(x), verbose=False)
    group = graph.get_pruning_group(layer, graph.get_pruner_of_module(layer).prune_out_channels,
                                    list(range(num_outputs(layer))))
    names = {layer: name for name, layer in model.named_modules()}
    return {(names[item.dep.target.module],
             'out' if graph.is_out_channel_pruning_fn(item.dep.handler) else 'in'):
            list(zip(item.idxs, item.root_idxs))
            for item in group if item.dep.target.module in names}


def same(pairs, expected):
    return sorted(pairs) == sorted(expected)


def test_slice_in_a_concatenation():
    """Torch-Pruning takes the channels before a slice for those behind it, gets a sum that does
    not fit and gives up: here ``b`` seems to be the first two inputs of ``pred``."""
    model = Toy(lambda net, x: net.pred(torch.cat((net.a(x)[:, :1], net.b(x)), 1)),
                a=conv(3, 4), b=conv(3, 2), pred=conv(3, 2))
    assert unrepaired(model, 'b')['pred', 'in'] == [(0, 0), (1, 1)]
    assert same(repaired(model, 'b')['pred', 'in'], [(1, 0), (2, 1)])


def test_concatenation_of_concatenations():
    """Torch-Pruning guesses the channels of the inner one wrongly and loses half of them."""
    def forward(net, x):
        x = net.a(x)
        x = torch.cat((x, x), 1)
        return net.pred(torch.cat((x, x, F.max_pool2d(x, 3, 1, 1)), 1))

    model = Toy(forward, a=conv(3, 2), pred=conv(12, 2))
    assert len(unrepaired(model, 'a')['pred', 'in']) == 6
    assert same(repaired(model, 'a')['pred', 'in'], [(channel, channel % 2)
                                                     for channel in range(12)])


def test_channel_with_several_indices_in_the_unit():
    """Torch-Pruning keeps only one of them, so that the channels 0 and 2 of ``d``, which are
    both added to channel 0 of ``a``, seem to be independent."""
    def forward(net, x):
        first = net.a(x)
        return net.pred(torch.cat((first, first), 1) + net.d(x))

    model = Toy(forward, a=conv(3, 2), d=conv(3, 4), pred=conv(4, 1))
    assert unrepaired(model, 'd')['a', 'out'] == [(0, 0), (1, 1)]
    found = repaired(model, 'd')
    assert same(found['a', 'out'], [(0, 0), (1, 1), (0, 2), (1, 3)])
    assert same(found['d', 'out'], [(0, 0), (1, 1), (2, 2), (3, 3),
                                    (0, 2), (1, 3), (2, 0), (3, 1)])


def test_order_behind_a_flatten():
    """Torch-Pruning shuffles channels on the way back through a flatten, and takes each new
    order for other channels that it has to follow."""
    indices = [Index(element, element // 4) for element in range(32)]
    channels = [(channel, channel) for channel in range(8)]
    found = _FlattenIndexMapping(4, reverse=True)(indices)
    assert same(found, channels) and found != channels
    assert OrderedFlattening(4, reverse=True)(indices) == channels
    assert OrderedFlattening(4)([Index(1, 0)]) == [(element, 0) for element in range(4, 8)]

    model = Toy(lambda net, x: net.pred(net.a(x).flatten(1) + net.d(x.mean((2, 3)))),
                d=nn.Linear(3, 16), a=conv(3, 4), pred=nn.Linear(16, 1))
    assert unrepaired(model, 'd', (3, 2, 2))['a', 'out'][1] == (3, 14)
    assert repaired(model, 'd', (3, 2, 2))['a', 'out'] == [(number // 4, number)
                                                           for number in range(16)]


def attended(net, x):
    """Global context attention; the view has to be no flatten of a map."""
    x = net.a(x)
    keys = net.keys(x).view(len(x), -1, 1).softmax(1)
    return net.pred(x + torch.matmul(x.flatten(2), keys).view(len(x), -1, 1, 1))


def test_limits():
    """Torch-Pruning takes the view for a flatten and multiplies channels without end."""
    model = Toy(attended, a=conv(3, 6), keys=conv(6, 1), pred=conv(6, 2))
    with pytest.raises(PruningError, match='no end of what is coupled'):
        repaired(model, 'a')


def expanded(net, x):
    x = net.a(x)[:, :, None].expand(-1, -1, 2, -1, -1)
    return net.pred(x.sum(2) + net.b(x[:, :, 0]))


def test_expand_in_five_dimensions():
    """Torch-Pruning takes it for the repeated heads of a transformer."""
    model = Toy(expanded, a=conv(3, 4), b=conv(4, 4), pred=conv(4, 1))
    assert ('pred', 'in') not in unrepaired(model, 'a')
    identity = [(channel, channel) for channel in range(4)]
    found = repaired(model, 'a')
    assert found['pred', 'in'] == found['b', 'in'] == found['b', 'out'] == identity


def package():
    """All attributes of the modules and classes of Torch-Pruning, and its shared pruners."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split('.')[0] == 'torch_pruning':
            found.update(((name, key), value) for key, value in vars(module).items())
            for kind in vars(module).values():
                if isinstance(kind, type) and kind.__module__.startswith('torch_pruning'):
                    found.update(((kind, key), value) for key, value in vars(kind).items())
    pruners = torch_pruning.pruner.function.PrunerBox
    found.update((('pruner', kind), set(vars(pruner))) for kind, pruner in pruners.items())
    return found


def test_installed_package_is_left_alone():
    """Also while a model is traced."""
    def forward(net, x):
        found.append(package())
        x = net.a(x)
        x = torch.cat((x[:, :2], net.b(x), x.split((1, 3), 1)[0]), 1)
        return net.pred(x.flatten(1)), net.c(x)

    found = []
    model = Toy(forward, a=Block(3, 4), b=Block(4, 3), c=conv(6, 1), pred=nn.Linear(6 * 64, 2))
    before = package()
    assert len(before) > 500
    find_units(model, SIZE)
    for after in (*found, package()):
        assert after.keys() == before.keys()
        assert all(after[key] is value or after[key] == value for key, value in before.items())

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, randomise

from mmgcp.pruning import BNScale
from mmgcp.pruning.dependency_graph import find_coupled_channels
from mmgcp.registry import TASK_UTILS


def scored(model):
    coupled_sets, _ = find_coupled_channels(model, (3, 8, 8))
    return {coupled.name: BNScale()(model, coupled) for coupled in coupled_sets}


def test_absolute_scales_of_coupled_layers():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x) + net.b(x)),
                          a=Block(3, 3), b=Block(3, 3), pred=nn.Conv2d(3, 1, 1)))
    model.a.bn.weight.data = torch.tensor([0.5, -2., 0.])
    model.b.bn.weight.data = torch.tensor([-1., 0.25, 3.])
    scores = scored(model)['a.conv']
    assert {layer: row.tolist() for layer, row in scores.items()} == {
        'a.bn': [0.5, 2., 0.], 'b.bn': [1., 0.25, 3.]}
    assert not any(row.requires_grad for row in scores.values())


def test_part_of_a_layer():
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        a=Block(3, 2), b=Block(3, 2), c=Block(3, 4), pred=nn.Conv2d(4, 1, 1)))
    model.c.bn.weight.data = torch.tensor([1., -2., 3., -4.])
    scores = scored(model)
    assert scores['a.conv']['c.bn'].tolist() == [1., 2.]
    assert scores['b.conv']['c.bn'].tolist() == [3., 4.]


def test_channels_that_a_layer_does_not_have_are_nan():
    model = randomise(Toy(
        lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
        c=Block(3, 4), a=Block(3, 2), b=Block(3, 2), pred=nn.Conv2d(4, 1, 1)))
    model.b.bn.weight.data = torch.tensor([-5., 6.])
    row = scored(model)['c.conv']['b.bn']
    assert row[:2].isnan().all() and row[2:].tolist() == [5., 6.]


def test_layers_without_scales_have_no_scores():
    model = randomise(Toy(lambda net, x: net.pred(net.norm(net.a(x))), a=nn.Conv2d(3, 2, 1),
                          norm=nn.BatchNorm2d(2, affine=False), pred=nn.Conv2d(2, 1, 1)))
    assert all(rows == {} for rows in scored(model).values())
    assert 'a' in scored(model)


def test_is_registered():
    assert isinstance(TASK_UTILS.build(dict(type='mmgcp.BNScale')), BNScale)

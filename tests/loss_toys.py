# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Tiny networks with a loss, batches for them, and a check that a model has not changed."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import Block, Toy, randomise, tensors

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.graph import find_units

SHAPE = (3, 8, 8)


class LossToy(Toy):
    """A network whose loss is the mean squared error of each output, summed over the images."""

    def forward(self, x, data_samples=None, mode='tensor'):
        outputs = self.run(self, x.to(next(self.parameters()).dtype))
        if mode == 'tensor':
            return outputs
        assert mode == 'loss' and torch.is_grad_enabled()
        targets = data_samples['targets']
        return {f'loss_{number}': (output.flatten(1) - targets[:, None]).square().mean(1).sum()
                for number, output in enumerate(tensors(outputs))}

    def parse_losses(self, losses):
        return sum(losses.values()), losses


def relu_block(*args, **kwargs):
    return Block(*args, act=nn.ReLU, **kwargs)


def chain():
    """Two layers in a row."""
    return LossToy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 6, 3),
                   b=Block(6, 5, 3, stride=2), pred=nn.Conv2d(5, 2, 1))


def residual():
    """A shortcut with two consumers: the first layer of the block, and the prediction."""
    def run(net, x):
        x = net.stem(x)
        return net.pred(x + net.b(net.a(x)))

    return LossToy(run, stem=Block(3, 6), a=Block(6, 4, 3), b=Block(4, 6), pred=nn.Conv2d(6, 2, 1))


def concat():
    """Two parallel layers, whose concatenated outputs have two consumers."""
    def run(net, x):
        x = torch.cat((net.a(x), net.b(x)), 1)
        return net.first(x), net.second(F.max_pool2d(x, 2))

    return LossToy(run, a=Block(3, 4), b=Block(3, 5, 3), first=nn.Conv2d(9, 2, 3, padding=1),
                   second=nn.Conv2d(9, 3, 1))


def repeated():
    """A layer that runs on two levels, followed by a convolution and by a linear layer."""
    def run(net, x):
        x = net.a(x)
        levels = [net.shared(x), net.shared(F.max_pool2d(x, 2))]
        return net.pred(levels[0]), net.linear(levels[1].flatten(1))

    return LossToy(run, a=Block(3, 4), shared=Block(4, 5, 3), pred=nn.Conv2d(5, 2, 1),
                   linear=nn.Linear(5 * 16, 3))


TOYS = {make.__name__: make for make in (chain, residual, concat, repeated)}


def make_toy(name, double=True):
    """A network with random weights in eval mode, and its channel units."""
    torch.manual_seed(0)
    model = randomise(TOYS[name]()).eval()
    units, _ = find_units(model, SHAPE)
    return (model.double() if double else model), units


def make_batches(*sizes, shape=SHAPE, seed=0):
    """Random images and targets in batches of these sizes; all of them depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), *shape, generator=generator)
    targets = torch.randn(sum(sizes), generator=generator)
    return [Batch(*pair) for pair in zip(
        images.double().split(sizes), [dict(targets=part) for part in targets.split(sizes)])]


def silent(stage, done, steps):
    """A progress callback that does nothing."""


def prepared(criterion, model, units, batches):
    """The scores of all units: name of the unit -> name of the vote -> scores."""
    criterion.prepare(model, units, batches, silent)
    return {unit.name: criterion(model, unit) for unit in units}


def snapshot(model):
    """Copies of the weights and statistics of a model, and its gradients, modes and hooks."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: (param.grad, param.requires_grad) for name, param in model.named_parameters()}
    modes = {name: (module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
             for name, module in model.named_modules()}
    return tensors, flags, modes


def assert_as_before(model, before):
    tensors, flags, modes = snapshot(model)
    assert tensors.keys() == before[0].keys() and (flags, modes) == before[1:]
    assert all(torch.equal(value, before[0][name]) for name, value in tensors.items())

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Small networks to prune, and what pruning them must lead to."""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.models.necks.ssd_neck import L2Norm

from mmgcp.pruning.units import ChannelSlice, ChannelUnit

# The five groups of GCP-SAD for YOLOv4
GROUPS = [
    dict(name='stride-8', modules=['backbone.stem', 'backbone.stage[123]']),
    dict(name='stride-16', modules=['backbone.stage4']),
    dict(name='stride-32', modules=['backbone.stage5', 'neck.reduce_layers.2']),
    dict(
        name='top-down',
        modules=['neck.reduce_layers.[01]', 'neck.upsample_layers', 'neck.top_down_layers']),
    dict(
        name='bottom-up',
        modules=['neck.downsample_layers', 'neck.bottom_up_layers', 'bbox_head']),
]


def randomise(model, seed=0):
    """Random weights, scales, shifts and statistics that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                fan_in = module.weight[0].numel()
                module.weight.normal_(0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.normal_(0, 0.5, generator=generator)
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.1, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
                module.running_mean.normal_(0, 0.2, generator=generator)
                module.running_var.uniform_(0.6, 1.4, generator=generator)
            elif isinstance(module, L2Norm):  # whose weight is whatever was in memory
                module.weight.fill_(module.scale)
    return model


class Block(nn.Module):
    """Convolution, BatchNorm, activation."""

    def __init__(self, inputs, outputs, kernel=1, act=nn.LeakyReLU, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.act = act()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Toy(nn.Module):
    """Named layers and a function that runs them."""

    def __init__(self, run, **layers):
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x, mode='tensor'):
        assert mode == 'tensor'
        return self.run(self, x.to(next(self.parameters()).dtype))


def residual_toy(kernel=1):
    """A chain of two shortcuts and a prediction."""
    layers = dict(stem=Block(3, 8, kernel), pred=nn.Conv2d(8, 5, 1))
    for number in (1, 2):
        layers[f'a{number}'] = Block(8, 6, kernel)
        layers[f'b{number}'] = Block(6, 8, kernel)

    def run(net, x):
        x = net.stem(x)
        x = x + net.b1(net.a1(x))
        x = x + net.b2(net.a2(x))
        return net.pred(x)

    return randomise(Toy(run, **layers))


def two_branches():
    """The module that is named last runs first."""
    def forward(net, x):
        x = net.z(x)
        return net.pred(torch.cat((net.b(net.a(x)), net.c(x)), 1))

    return randomise(Toy(forward, a=Block(10, 7), b=Block(7, 4), c=Block(10, 8),
                         pred=nn.Conv2d(12, 2, 1), z=Block(3, 10, 3)))


def make_unit(size, *parts, **constraints):
    """The unit of a prediction, of which layers read parts."""
    slices = [ChannelSlice('pred', side, torch.arange(len(part)), torch.tensor(part))
              for side, part in (('out', range(size)), *(('in', part) for part in parts))]
    return ChannelUnit('pred', size, tuple(slices), **constraints)


class RandomNet(nn.Module):
    """A network of convolutions, shortcuts, concatenations, poolings and upsamplings.

    Args:
        ops (list[tuple]): Kind of each step, two numbers that choose earlier maps, and
            the channels of a convolution.
        kernel (int): Kernel of the convolutions.
        act (type): Activation.
    """

    def __init__(self, ops, kernel=3, act=nn.LeakyReLU):
        super().__init__()
        self.layers = nn.ModuleList([Block(3, 4, kernel, act)])
        self.steps = []
        widths, used = [4], set()
        for kind, first, second, width in ops:
            first, second = first % len(widths), second % len(widths)
            layer = nn.Identity()
            if kind == 'conv':
                layer = Block(widths[first], width, kernel, act)
            elif kind == 'add':
                width = widths[first]
                if widths[second] != width:
                    layer = Block(widths[second], width, kernel, act)
            elif kind == 'cat':
                width = widths[first] + widths[second]
            elif kind == 'repeat':
                layer = Block(widths[first], width, kernel, act)
                width = 2 * width + widths[second]
            else:
                width = widths[first]
            used |= {first, second} if kind in ('add', 'cat', 'repeat') else {first}
            self.layers.append(layer)
            self.steps.append((kind, first, second))
            widths.append(width)
        self.leaves = [index for index in range(len(widths)) if index not in used]
        self.preds = nn.ModuleList([nn.Conv2d(widths[index], 3, 1) for index in self.leaves])

    def forward(self, x, mode='tensor'):
        maps = [self.layers[0](x.to(self.preds[0].weight.dtype))]
        for layer, (kind, first, second) in zip(self.layers[1:], self.steps):
            a, b = maps[first], maps[second]
            if kind == 'conv':
                maps.append(layer(a))
            elif kind == 'add':
                maps.append(a + layer(b))
            elif kind == 'cat':
                maps.append(torch.cat((a, b), 1))
            elif kind == 'repeat':
                a = layer(a)
                maps.append(torch.cat((a, b, F.max_pool2d(a, 5, 1, 2)), 1))
            elif kind == 'pool':
                maps.append(F.max_pool2d(a, 3, 1, 1))
            else:
                maps.append(F.max_pool2d(F.interpolate(a, scale_factor=2.), 2))
        return [pred(maps[index]) for pred, index in zip(self.preds, self.leaves)]


def tensors(outputs):
    """The tensors of nested tuples and lists."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for item in outputs for tensor in tensors(item)]


@torch.no_grad()
def run(model, size=64, seed=0):
    """The outputs in eval mode, in double precision, for a random image."""
    image = torch.rand(2, 3, size, size, dtype=torch.float64,
                       generator=torch.Generator().manual_seed(seed))
    return tensors(copy.deepcopy(model).double().eval()(image, mode='tensor'))


def difference(first, second):
    """The largest difference of two lists of outputs."""
    assert [x.shape for x in first] == [y.shape for y in second]
    return max(float((x - y).abs().max()) for x, y in zip(first, second))


def choose(units, seed, share=None):
    """Random channels to remove of each unit, at least one channel stays."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for unit in units:
        top = unit.size if share is None else max(1, int(unit.size * share) + 1)
        number = int(torch.randint(0, top, (1, ), generator=generator))
        order = torch.randperm(unit.size, generator=generator)
        if number:
            removed[unit.name] = order[:number].sort().values
    return removed


@torch.no_grad()
def set_channels(model, units, removed, scale=0., shift=0.):
    """Set the BatchNorm scales (and shifts, unless None) of channels, in all their layers."""
    for unit in units:
        chosen = removed.get(unit.name, torch.zeros(0)).tolist()
        for item in unit.slices:
            module = model.get_submodule(item.module)
            if item.side == 'out' and isinstance(module, nn.BatchNorm2d):
                for channel, root in zip(item.channels.tolist(), item.unit_index.tolist()):
                    if root in chosen:
                        module.weight[channel] = scale
                        if shift is not None:
                            module.bias[channel] = shift
    return model

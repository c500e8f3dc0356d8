# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A tiny network for each kind of layer that has channels, and what may be removed of it."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from pruning_samples import Block, Toy, randomise


def _chain(*names):
    def run(net, x):
        for name in names:
            x = getattr(net, name)(x)
        return x
    return run


def plain():
    return Toy(_chain('a', 'b', 'pred'), a=Block(3, 8, 3), b=Block(8, 6, 3, stride=2),
               pred=nn.Conv2d(6, 2, 1))


def biased():
    """Convolutions and linear layers without normalisation; one runs twice, one never."""
    def run(net, x):
        x = F.relu(net.twice(F.relu(net.a(x))))
        x = net.twice(F.max_pool2d(x, 2))
        return net.pred(F.relu(net.hidden(F.adaptive_avg_pool2d(x, 2).flatten(1))))

    return Toy(run, a=nn.Conv2d(3, 5, 3), twice=nn.Conv2d(5, 5, 1), hidden=nn.Linear(20, 7),
               unused=nn.Conv2d(4, 4, 3), pred=nn.Linear(7, 2))


def depthwise():
    return Toy(_chain('a', 'each', 'norm', 'b', 'pred'), a=Block(3, 8),
               each=nn.Conv2d(8, 8, 3, padding=1, groups=8), norm=nn.BatchNorm2d(8),
               b=Block(8, 6), pred=nn.Conv2d(6, 2, 1))


def grouped():
    return Toy(_chain('a', 'parts', 'norm', 'pred'), a=Block(3, 12),
               parts=nn.Conv2d(12, 9, 3, groups=3), norm=nn.BatchNorm2d(9),
               pred=nn.Conv2d(9, 2, 1))


def group_norm():
    return Toy(_chain('a', 'norm', 'b', 'pred'), a=nn.Conv2d(3, 12, 3, bias=False),
               norm=nn.GroupNorm(4, 12), b=Block(12, 6), pred=nn.Conv2d(6, 2, 1))


def parameter():
    """A factor and a summand for each channel, as in the layers of some Transformers."""
    model = Toy(lambda net, x: net.pred(net.a(x) * net.factor + net.summand), a=Block(3, 8),
                pred=nn.Conv2d(8, 2, 1))
    model.factor = nn.Parameter(torch.linspace(0.5, 2, 8).view(1, 8, 1, 1))
    model.summand = nn.Parameter(torch.linspace(-1, 1, 8).view(8, 1, 1))
    return model


def transposed():
    return Toy(_chain('a', 'up', 'norm', 'pred'), a=Block(3, 8, stride=2),
               up=nn.ConvTranspose2d(8, 6, 3, 2), norm=nn.BatchNorm2d(6), pred=nn.Conv2d(6, 2, 1))


def grouped_transposed():
    return Toy(_chain('a', 'up', 'pred'), a=Block(3, 8),
               up=nn.ConvTranspose2d(8, 6, 2, 2, groups=2), pred=nn.Conv2d(6, 2, 1))


def depthwise_transposed():
    return Toy(_chain('a', 'up', 'pred'), a=nn.Conv2d(3, 8, 1),
               up=nn.ConvTranspose2d(8, 8, 2, 2, groups=8), pred=nn.Conv2d(8, 2, 1))


def joined():
    """Two layers that have half of the channels of a third."""
    return Toy(lambda net, x: net.pred(torch.cat((net.a(x), net.b(x)), 1) + net.c(x)),
               c=Block(3, 8), a=Block(3, 4), b=Block(3, 4), pred=nn.Conv2d(8, 2, 1))


KINDS = {
    make.__name__: make
    for make in (plain, biased, depthwise, grouped, group_norm, parameter, transposed,
                 grouped_transposed, depthwise_transposed, joined)
}


def make_kind(name):
    """Build the network of a kind with random weights and scales."""
    torch.manual_seed(0)
    model = randomise(KINDS[name]())
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.1, 1.5)
    return model


def some_of_each(units, seed):
    """Random channels to remove: whole units, equally many of each block, no layer's all."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for unit in units:
        if unit.conv_groups is not None:
            members = [(unit.conv_groups == block).nonzero().flatten()
                       for block in range(int(unit.conv_groups.max()) + 1)]
            number = _some(len(members[0]), generator)
            chosen = torch.cat([
                part[torch.randperm(len(part), generator=generator)[:number]] for part in members])
        else:
            norm_groups = torch.arange(unit.size) if unit.norm_groups is None else unit.norm_groups
            count = int(norm_groups.max()) + 1
            gone = torch.randperm(count, generator=generator)[:_some(count, generator)]
            chosen = torch.isin(norm_groups, gone).nonzero().flatten()
        gone = unit.mask(chosen)
        for item in unit.slices:
            gone[item.unit_index[0]] &= not bool(gone[item.unit_index].all())
        removed[unit.name] = gone.nonzero().flatten()
    return removed


def first_part(units, removed):
    """About half of the channels to remove: whole units, equally many of each block."""
    part = {}
    for unit in units:
        chosen = removed.get(unit.name, torch.zeros(0, dtype=torch.long))
        if unit.norm_groups is not None:
            groups = unit.norm_groups[chosen]
            chosen = chosen[torch.isin(groups, groups.unique()[::2])]
        else:
            blocks = torch.zeros(unit.size) if unit.conv_groups is None else unit.conv_groups
            members = [chosen[blocks[chosen] == block] for block in blocks.unique()]
            chosen = torch.cat([channels[::2] for channels in members]).sort().values
        if len(chosen):
            part[unit.name] = chosen
    return part


def _some(count, generator):
    """A random number from one to count - 1."""
    return 1 + int(torch.randint(count - 1, (1, ), generator=generator))

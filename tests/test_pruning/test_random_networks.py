# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Random networks, compared with a record of all their channels."""
import copy
import random

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from layer_kinds import first_part
from pruning_samples import difference, randomise, run
from zeroing import zero

from mmgcp.nn.layers import find_layer
from mmgcp.pruning import apply_channel_table, attributes, register_attribute_rule
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.remaining import remaining_channels, remaining_units
from mmgcp.pruning.surgery import channels_off, remove_channels

SIZE = (3, 8, 8)
KINDS = ['conv', 'norm', 'grouped', 'depthwise', 'transposed', 'shared', 'gate', 'affine', 'fork',
         'add', 'cat', 'repeat', 'twice', 'pool', 'resize', 'scalar']
REASONS = ('predictions', 'prediction layer', 'both the GroupNorm', 'not all channels of a group',
           'only some channels of the grouped', 'divide its channels differently',
           'tied to each other')


class Book:
    """Which channels of which layers can only go together.

    Each channel has a number, the same wherever it is read. Numbers are joined where maps are
    added or multiplied, and where one layer reads several maps.
    """

    def __init__(self):
        self.parents = []
        self.layers = {}  # (name, side) -> channels
        self.norm_groups = []  # channels that a GroupNorm normalises together

    def new(self, number):
        start = len(self.parents)
        self.parents += range(start, start + number)
        return list(range(start, start + number))

    def find(self, channel):
        while self.parents[channel] != channel:
            channel = self.parents[channel]
        return channel

    def join(self, first, second):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            self.parents[self.find(one)] = self.find(other)
        return first

    def record(self, name, side, channels):
        """Note the channels of a layer. If it is there already, it reads these, too."""
        return self.join(self.layers.setdefault((name, side), channels), channels)

    def classes(self, name, side):
        return [self.find(channel) for channel in self.layers[name, side]]


class Conv(nn.Module):
    """A convolution of any kind, a normalisation and an activation."""

    def __init__(self, inputs, outputs, kind=nn.Conv2d, groups=1, norm_groups=0, kernel=3):
        super().__init__()
        options = dict(stride=2) if kind is nn.ConvTranspose2d else {}
        self.conv = kind(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False,
                         **options)
        self.norm = nn.GroupNorm(norm_groups, outputs) if norm_groups else nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.leaky_relu(self.norm(F.adaptive_avg_pool2d(self.conv(x), 8)))

    def number(self, book, name, x):
        conv = self.conv
        if conv.groups == conv.in_channels == conv.out_channels > 1:
            outputs = book.record(f'{name}.conv', 'out', x)
        else:
            book.record(f'{name}.conv', 'in', x)
            outputs = book.record(f'{name}.conv', 'out', book.layers.get(
                (f'{name}.conv', 'out')) or book.new(conv.out_channels))
        if isinstance(self.norm, nn.GroupNorm):
            size = len(outputs) // self.norm.num_groups
            book.norm_groups += [outputs[start:start + size]
                                 for start in range(0, len(outputs), size)]
        return book.record(f'{name}.norm', 'out', outputs)


class Gate(nn.Module):
    """Channel attention."""

    def __init__(self, width):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, 3, 1), nn.Conv2d(3, width, 1)

    def forward(self, x):
        return x * self.excite(F.leaky_relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()

    def number(self, book, name, x):
        book.record(f'{name}.squeeze', 'in', x)
        book.record(f'{name}.excite', 'in', book.record(f'{name}.squeeze', 'out', book.new(3)))
        return book.record(f'{name}.excite', 'out', x)


class Affine(nn.Module):
    """A factor and a summand for each channel."""

    def __init__(self, width):
        super().__init__()
        self.factor = nn.Parameter(1 + torch.rand(width))
        self.summand = nn.Parameter(torch.rand(1, width, 1, 1))

    def forward(self, x):
        return x * self.factor[None, :, None, None] + self.summand

    def number(self, book, name, x):
        if len(x) > 1:  # otherwise they are scalars
            book.record(f'{name}.factor', 'out', x)
            book.record(f'{name}.summand', 'out', x)
        return x


class Fork(nn.Module):
    """Parts of a map, each read by a convolution, some of them twice."""

    def __init__(self, sizes, indexed, shortcut):
        super().__init__()
        self.sizes, self.indexed, self.shortcut = sizes, indexed, shortcut
        self.readers = nn.ModuleList([Conv(size, size if shortcut else 3) for size in sizes])

    def forward(self, x):
        if self.indexed:
            ends = [sum(self.sizes[:number]) for number in range(len(self.sizes) + 1)]
            parts = [x[:, start:end] for start, end in zip(ends, ends[1:])]
        else:
            parts = list(x.split(self.sizes, 1))
        read = [reader(part) for reader, part in zip(self.readers, parts)]
        if self.shortcut:
            read[-1] = read[-1] + parts[-1]
        return torch.cat((*read, *parts[1:]), 1)

    def number(self, book, name, x):
        parts, read = [], []
        for number, size in enumerate(self.sizes):
            parts.append(x[:size])
            x = x[size:]
            read.append(self.readers[number].number(book, f'{name}.readers.{number}', parts[-1]))
        if self.shortcut:
            book.join(read[-1], parts[-1])
        return sum(read + parts[1:], [])


class Join(nn.Module):
    """Anything without weights."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x, y=None):
        if self.kind == 'add':
            return x + y
        if self.kind == 'cat':
            return torch.cat((x, y), 1)
        if self.kind == 'repeat':
            return torch.cat((x, y, F.max_pool2d(x, 5, 1, 2)), 1)
        if self.kind == 'twice':
            return torch.cat([x, x], dim=1)
        if self.kind == 'pool':
            return F.max_pool2d(x, 3, 1, 1)
        if self.kind == 'resize':
            return F.max_pool2d(F.interpolate(x, scale_factor=2), 2)
        return 2 * F.dropout(x, 0.3, self.training) + 0

    def number(self, book, name, x, y=None):
        if self.kind == 'add':
            return book.join(x, y)
        return {'cat': lambda: x + y, 'repeat': lambda: x + y + x,
                'twice': lambda: x + x}.get(self.kind, lambda: x)()


class Net(nn.Module):
    """A random network.

    Args:
        ops (list[tuple]): Kind of each step, two numbers that choose the maps it reads, and
            two that choose its size.
        seed (int): Chooses the order of the modules, and so the layers that units are named after.
    """

    def __init__(self, ops, seed):
        super().__init__()
        self.book, self.program, self.maps = Book(), [], []
        self.image = self.book.new(3)
        self.modules_by_name = {}
        self.add(Conv(3, 4), None)
        self.used = set()
        for op in ops:
            self.make(*op)
        self.leaves = [index for index in range(len(self.maps)) if index not in self.used]
        preds = [nn.Conv2d(len(self.maps[leaf]), 2, 1) for leaf in self.leaves]
        for number, leaf in enumerate(self.leaves):
            self.book.record(f'preds.{number}', 'in', self.maps[leaf])
        names = list(self.modules_by_name)
        random.Random(seed).shuffle(names)
        self.steps = nn.ModuleDict({name: self.modules_by_name[name] for name in names})
        self.preds = nn.ModuleList(preds)
        del self.modules_by_name

    def add(self, module, *inputs, name=None):
        """Append a step and return the number of its map."""
        if name is None:
            name = f's{len(self.program)}'
            self.modules_by_name[name] = module
        labels = [self.image if index is None else self.maps[index] for index in inputs]
        self.program.append((name, inputs))
        self.maps.append(module.number(self.book, f'steps.{name}', *labels))
        return len(self.maps) - 1

    def fitting(self, index, width):
        """A map of a width: the given one, or the output of a convolution that reads it."""
        have = len(self.maps[index])
        return index if have == width else self.add(Conv(have, width), index)

    def make(self, kind, first, second, width, option):
        first, second = first % len(self.maps), second % len(self.maps)
        self.used.add(first)
        have = len(self.maps[first])
        if kind in ('add', 'cat', 'repeat'):
            self.used.add(second)
            if kind == 'add' and len(self.maps[second]) != have:
                second = self.fitting(second, have)
                self.used.add(second)
            self.add(Join(kind), first, second)
        elif kind == 'conv':
            self.add(Conv(have, width), first)
        elif kind == 'norm':
            self.add(Conv(have, 2 * width, norm_groups=width if option else 2), first)
        elif kind == 'grouped':
            groups = next(number for number in (4, 3, 2, 1) if have % number == 0)
            groups = 1 if groups == have else groups
            self.add(Conv(have, groups * width, (nn.Conv2d, nn.ConvTranspose2d)[option],
                          groups), first)
        elif kind == 'depthwise':
            self.add(Conv(have, have, groups=have), first)
        elif kind == 'transposed':
            self.add(Conv(have, width, nn.ConvTranspose2d, kernel=2), first)
        elif kind == 'shared':
            second = self.fitting(second, have)
            self.used.add(second)
            index = self.add(Conv(have, width), first)
            name = self.program[index][0]
            self.add(self.modules_by_name[name], second, name=name)
        elif kind in ('gate', 'affine'):
            self.add(dict(gate=Gate, affine=Affine)[kind](have), first)
        elif kind == 'fork' and have > 3:
            sizes = (1, have - 1) if option else (2, have - 3, 1)
            self.add(Fork(sizes, width % 2, second % 2), first)
        elif kind == 'fork':
            self.add(Conv(have, have), first)
        else:
            self.add(Join(kind), first)

    def forward(self, x, mode='tensor'):
        x = x.to(self.preds[0].weight)
        maps = []
        for name, inputs in self.program:
            maps.append(self.steps[name](*[x if index is None else maps[index]
                                           for index in inputs]))
        return [pred(maps[leaf]) for pred, leaf in zip(self.preds, self.leaves)]


OPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9), st.integers(2, 5),
              st.integers(0, 1)),
    min_size=2, max_size=10)


@pytest.fixture(scope='module', autouse=True)
def rules():
    """Tell mmgcp how :class:`Fork` splits."""
    @register_attribute_rule(Fork, splits=True)
    def refresh(fork):
        fork.sizes = [reader.conv.in_channels for reader in fork.readers]

    yield
    attributes.ATTRIBUTE_RULES.pop(Fork)
    attributes.SPLITTING_TYPES.remove(Fork)


def check_units(net, units, skipped):
    """Each unit has all occurrences of its channels and nothing else."""
    book = net.book
    everywhere = {}  # class -> occurrences
    for (name, side), channels in book.layers.items():
        for index, channel in enumerate(channels):
            everywhere.setdefault(book.find(channel), set()).add((name, side, index))
    seen = set()
    for unit in units:
        members = {root: set() for root in range(unit.size)}
        for item in unit.slices:
            for channel, root in zip(item.channels.tolist(), item.unit_index.tolist()):
                members[root].add((item.module, item.side, channel))
        found = []
        for places in members.values():
            (kind, ) = {book.find(book.layers[name, side][index])
                        for name, side, index in places}
            assert places == everywhere[kind]
            found.append(kind)
        assert len(set(found)) == unit.size and not seen & set(found)
        seen |= set(found)
        check_norm_groups(book, unit, found)
    for name, reason in skipped.items():
        assert any(text in reason for text in REASONS), (name, reason)
    convs = {name for name, module in net.named_modules() if isinstance(
        module, (nn.Conv2d, nn.ConvTranspose2d))}
    assert convs <= set(skipped) | {item.module for unit in units
                                    for item in unit.side('out')}


def check_norm_groups(book, unit, classes):
    """Channels go together if a GroupNorm needs it, and only then."""
    norm_groups = list(range(unit.size))
    for members in book.norm_groups:
        together = [index for index, kind in enumerate(classes)
                    if kind in {book.find(channel) for channel in members}]
        joined = {norm_groups[index] for index in together}
        norm_groups = [min(joined) if number in joined else number for number in norm_groups]
    if unit.norm_groups is None:
        assert norm_groups == list(range(unit.size))
    else:
        numbers = {group: number for number, group in enumerate(dict.fromkeys(norm_groups))}
        assert unit.norm_groups.tolist() == [numbers[group] for group in norm_groups]


def choose_channels(net, units, seed):
    """Random channels by unit, so that every layer keeps one, and their classes."""
    generator = random.Random(seed)
    removed, classes = {}, set()
    for unit in units:
        channels = set(generator.sample(range(unit.size), generator.randrange(unit.size)))
        if unit.norm_groups is not None:
            norm_groups = unit.norm_groups.tolist()
            channels = {root for root in range(unit.size)
                        if norm_groups[root] in {norm_groups[other] for other in channels}}
        if unit.conv_groups is not None:
            conv_groups = unit.conv_groups.tolist()
            members = [[root for root, group in enumerate(conv_groups) if group == number]
                       for number in range(max(conv_groups) + 1)]
            number = generator.randrange(len(members[0]))
            channels = {root for root in channels if conv_groups[root] < 0}
            channels |= {root for group in members for root in generator.sample(group, number)}
        own = net.book.classes(unit.name, 'out')
        (first, ) = [item for item in unit.slices
                     if (item.module, item.side) == (unit.name, 'out')][:1]
        chosen = {own[channel] for channel, index in zip(first.channels.tolist(),
                                                         first.unit_index.tolist())
                  if index in channels}
        left = [set(net.book.classes(*layer)) - classes - chosen for layer in net.book.layers]
        if channels and all(left):
            removed[unit.name] = torch.tensor(sorted(channels))
            classes |= chosen
    return removed, classes


def make(ops, seed):
    net = randomise(Net(ops, seed), seed)
    for module in net.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    return net


def check_network(ops, seed):
    net = make(ops, seed)
    units, skipped = find_units(net, SIZE)
    check_units(net, units, skipped)
    removed, classes = choose_channels(net, units, seed)
    gone = {layer: [index for index, channel in enumerate(channels)
                    if net.book.find(channel) in classes]
            for layer, channels in net.book.layers.items()}
    expected = run(zero(net, gone), 8)
    exact = 1e-9 * max(1., *(float(output.abs().max()) for output in expected))
    with channels_off(net, units, removed):
        assert difference(run(net, 8), expected) < exact
    check_two_goes(net, units, removed)
    remove_channels(net, units, removed)
    assert difference(run(net, 8), expected) < exact
    check_rebuilt(net, make(ops, seed), gone)
    for output in net.double().eval()(torch.rand(2, *SIZE), mode='tensor'):
        output.square().sum().backward(retain_graph=True)
    for name, param in net.named_parameters():
        assert param.grad.isfinite().all() and param.grad.abs().sum() > 0, name


def check_two_goes(net, units, removed):
    """Some channels first, and then the others, which leads to the same network."""
    first, second, gone = copy.deepcopy(net), copy.deepcopy(net), first_part(units, removed)
    remove_channels(first, units, removed)
    remove_channels(second, units, gone)
    remove_channels(second, remaining_units(units, gone), remaining_channels(removed, gone))
    assert difference(run(first, 8), run(second, 8)) == 0. and repr(first) == repr(second)


def check_rebuilt(net, rebuilt, gone):
    """All layers have as many channels as the book says, and that is all one has to know."""
    table = {}
    for (name, side), channels in gone.items():
        layer = find_layer(net, name)
        left = len(net.book.layers[name, side]) - len(channels)
        if isinstance(layer, nn.Parameter):
            assert layer.numel() == left
            table[name] = [left]
        elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm)):
            assert len(layer.weight) == left
            table[name] = [left]
        else:
            assert (layer.out_channels if side == 'out' else layer.in_channels) == left
            table[name] = [layer.in_channels, layer.out_channels]
    apply_channel_table(rebuilt, table)
    rebuilt.load_state_dict(net.state_dict())
    assert difference(run(rebuilt, 8), run(net, 8)) == 0.


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ops=OPS, seed=st.integers(0, 99))
# A map that is concatenated twice with itself
@example(ops=[('cat', 0, 0, 3, 0), ('repeat', 1, 1, 5, 1)], seed=74)
# Parts of a concatenation of a map with itself
@example(ops=[('cat', 0, 0, 3, 1), ('fork', 1, 0, 2, 0), ('gate', 2, 0, 2, 1)], seed=1115)
# A unit that is followed from a layer that has each of its channels twice
@example(ops=[('twice', 0, 0, 5, 1), ('depthwise', 1, 0, 5, 0)], seed=0)
@example(ops=[('twice', 0, 0, 5, 1), ('depthwise', 1, 0, 5, 0)], seed=1)
@example(ops=[('repeat', 0, 0, 2, 0), ('add', 1, 0, 4, 1), ('repeat', 1, 1, 2, 1),
              ('fork', 3, 0, 2, 0), ('gate', 2, 1, 4, 1)], seed=1175)
def test_random_networks(ops, seed):
    check_network(ops, seed)

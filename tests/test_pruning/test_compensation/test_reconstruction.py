# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reconstruction of networks, against NumPy and against what must come back exactly."""
import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn as nn
from families import family_config
from layer_kinds import KINDS, make_kind, some_of_each
from pruning_samples import Block, Toy, difference, randomise, tensors
from zeroing import zero

from mmgcp.errors import PruningError
from mmgcp.nn.forward import run_as_tensors
from mmgcp.pruning import prune
from mmgcp.pruning.compensation import rounds
from mmgcp.pruning.compensation.reconstruction import reconstruct
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.surgery import channels_off, gather_channels, remove_channels
from mmgcp.utils.config import build_detector

SHAPE = (3, 16, 16)


def images(number=2, size=8, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 3, size, size, generator=generator, dtype=torch.double)
            for _ in range(number)]


def build(run, **layers):
    return randomise(Toy(run, **layers)).double().eval()


def chain(**layers):
    """a -> b -> c -> pred with normalised layers."""
    found = dict(a=Block(3, 8, 3), b=Block(8, 6, 3), c=Block(6, 5), pred=nn.Conv2d(5, 2, 1))
    return build(lambda net, x: net.pred(net.c(net.b(net.a(x)))), **dict(found, **layers))


def fitted(model, removed, data, ridge=0., shape=SHAPE):
    """A copy of a model that is fitted to it, its units, and what was done."""
    units, _ = find_units(model, shape)
    changed = copy.deepcopy(model)
    done = reconstruct(changed, units, removed, data, shape, copy.deepcopy(model), ridge)
    return changed, units, done


@torch.no_grad()
def emitted(model, name, data, inputs=False):
    """What a layer reads or emits: (S, C) of all images and places."""
    found = []

    def keep(_, args, output):
        values = args[0] if inputs else output
        found.append(values.movedim(1, -1).flatten(0, -2).clone())

    handle = model.get_submodule(name).register_forward_hook(keep)
    for batch in data:
        run_as_tensors(model, batch)
    handle.remove()
    return torch.cat(found).numpy()


def changes(model, other):
    """The names of all that differs."""
    state = other.state_dict()
    return {name for name, value in model.state_dict().items()
            if not torch.equal(value, state[name])}


def least_squares(z, y):
    solution = np.linalg.lstsq(np.column_stack((z, np.ones(len(z)))), y, rcond=None)[0]
    return solution[:-1].T, solution[-1]


def test_each_layer_makes_up_for_those_before():
    """b is NumPy's best for what a has left, c for what b has made of that, and so on."""
    model = chain(b=Block(8, 4), c=Block(4, 3), pred=nn.Conv2d(3, 2, 1))
    data, removed = images(), {'a.conv': torch.tensor([1, 4, 5])}
    changed, units, done = fitted(model, removed, data)
    assert done.fits == dict.fromkeys(('b.conv', 'c.conv', 'pred'), 'kernel')
    assert done.incomplete == []
    kept = [0, 2, 3, 6, 7]
    for layer, norm in (('b.conv', 'b.bn'), ('c.conv', 'c.bn'), ('pred', None)):
        with channels_off(changed, units, removed):
            inputs = emitted(changed, layer, data, inputs=True)
        weight = changed.get_submodule(layer).weight.detach().flatten(1).numpy()
        if layer == 'b.conv':
            inputs, weight = inputs[:, kept], weight[:, kept]
        matrix, offset = least_squares(inputs, emitted(model, layer, data))
        assert np.allclose(weight, matrix, atol=1e-6)
        if norm is None:
            assert np.allclose(changed.pred.bias.detach(), offset, atol=1e-6)
        else:
            found, mean = (net.get_submodule(norm).running_mean for net in (changed, model))
            assert np.allclose(mean - found, offset, atol=1e-6)
    assert {name.split('.')[-1] for name in changes(changed, model)} == {
        'weight', 'running_mean', 'bias'}
    assert changes(changed.a, model.a) == set()


def test_what_is_not_behind_stays():
    model = chain()
    changed, _, done = fitted(model, {'b.conv': torch.tensor([0, 2])}, images())
    assert changes(changed, model) == {'c.conv.weight', 'c.bn.running_mean', 'pred.weight',
                                       'pred.bias'}
    assert list(done.fits) == ['c.conv', 'pred']


def test_nothing_removed():
    model = chain()
    changed, _, done = fitted(model, {}, images())
    assert changes(changed, model) == set() and done.fits == {}


def test_a_branch_without_changes_stays():
    """It runs after the first layer that changes, but its inputs are what they were."""
    model = build(lambda net, x: net.pred(net.b(net.a(x))) + net.other(net.side(x)),
                  a=Block(3, 6), b=Block(6, 4), pred=nn.Conv2d(4, 2, 1), side=Block(3, 5),
                  other=nn.Conv2d(5, 2, 1))
    changed, _, done = fitted(model, {'a.conv': torch.tensor([0, 3])}, images(), 1e-3)
    assert set(done.fits) == {'b.conv', 'pred', 'side.conv', 'other'}
    for name in ('side', 'other'):
        for before, after in zip(model.get_submodule(name).state_dict().values(),
                                 changed.get_submodule(name).state_dict().values()):
            assert torch.allclose(before, after, atol=1e-9)


@pytest.mark.parametrize('kernel', [1, 3])
def test_combinations_of_other_channels_cost_nothing(kernel):
    """Channels that are linear in kept ones, and of a pointwise reader a constant, come back."""
    model = chain(a=Block(3, 8, 3, nn.Identity), b=Block(8, 6, kernel))
    with torch.no_grad():
        model.a.conv.weight[1] = 2 * model.a.conv.weight[0] - model.a.conv.weight[5]
        model.a.bn.running_mean[1] = 0.7 if kernel == 1 else (
            model.a.bn.running_mean[0] * 2 - model.a.bn.running_mean[5])
        if kernel == 3:  # zero padding has no constant
            model.a.bn.bias.zero_()
    removed = {'a.conv': torch.tensor([1])}
    data, unseen = images(), images(1, 12, seed=7)
    changed, units, _ = fitted(model, removed, data, 1e-13)
    remove_channels(changed, units, removed)
    expected = model(unseen[0])
    assert difference([expected], [changed(unseen[0])]) < 1e-6 * float(expected.abs().max())
    plain = copy.deepcopy(model)
    remove_channels(plain, units, removed)
    assert difference([expected], [plain(unseen[0])]) > 0.1


TWINS = ['yolov6-n', 'rtmdet-tiny', 'ssdlite']


@torch.no_grad()
def make_twins(model, units):
    """Give units a channel that is the same as another one in all layers that emit it."""
    removed = {}
    for unit in units:
        if unit.norm_groups is not None or unit.conv_groups is not None or unit.parts:
            continue
        for item in unit.side('out'):
            layer = model.get_submodule(item.module)
            first, second = (item.channels[item.unit_index == index] for index in (0, 1))
            for value in (*layer.parameters(), *layer.buffers()):
                if value.dim() and isinstance(layer, nn.ConvTranspose2d) and value.dim() > 1:
                    value = value.transpose(0, 1)
                if value.dim():
                    value[second] = value[first]
        removed[unit.name] = torch.tensor([1])
    return removed


@pytest.mark.parametrize('name', TWINS)
def test_twins_in_detectors(name, monkeypatch):
    """Where each removed channel has a twin, nothing of the outputs is lost."""
    monkeypatch.setattr(rounds, 'PLACES', 10**6)
    shape, data = (3, 64, 64), images(1, 64, count=2)
    model = randomise(build_detector(family_config(name))).double().eval()
    units, _ = find_units(model, shape)
    removed = make_twins(model, units)
    assert len(removed) > 10
    changed, units, done = fitted(model, removed, data, 1e-12, shape)
    remove_channels(changed, units, removed)
    with torch.no_grad():
        expected, found = (tensors(run_as_tensors(net, data[0])) for net in (model, changed))
    for old, new in zip(expected, found):
        assert difference([old], [new]) < 1e-5 * float(1 + old.abs().max())
    assert ('mixture of inputs' in done.fits.values()) == (name != 'ssdlite')


@pytest.mark.parametrize('name', KINDS)
def test_surgery_afterwards_is_exact(name):
    model = make_kind(name).double().eval()
    units, _ = find_units(model, SHAPE)
    removed = some_of_each(units, seed=1)
    data = images(size=16)
    changed, units, done = fitted(model, removed, data, 1e-2)
    assert all(torch.isfinite(value).all() for value in changed.state_dict().values())
    readers = {item.module for unit in units for item in unit.side('in')
               if item.module != 'unused'}
    assert readers <= set(done.fits)
    gone = {key: channels.tolist() for key, channels in gather_channels(units, removed).items()}
    expected = zero(changed, gone)(data[0])
    before = zero(model, gone)(data[0])
    remove_channels(changed, units, removed)
    assert difference([expected], [changed(data[0])]) < 1e-9
    original = model(data[0])
    errors = [float((output - original).square().mean()) for output in (expected, before)]
    assert errors[0] < errors[1]


class Levels(nn.Module):
    """Two convolutions that two levels share, with BatchNorms of their own or none."""

    def __init__(self, separate):
        super().__init__()
        self.first, self.second = (nn.Conv2d(*sizes, bias=not separate)
                                   for sizes in ((8, 6, 1), (6, 5, 1)))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm2d(width) if separate else nn.Identity()
                          for width in (6, 5)) for _ in range(2))
        self.pred = nn.Conv2d(5, 2, 1)

    def forward(self, x):
        return [self.pred(two(self.second(one(self.first(level)).relu())).relu())
                for level, (one, two) in zip((x, nn.functional.avg_pool2d(x, 2)), self.norms)]


@pytest.mark.parametrize('separate', [True, False])
def test_shared_heads(separate):
    model = build(lambda net, x: net.head(net.a(x)), a=Block(3, 8, 3), head=Levels(separate))
    removed = {'a.conv': torch.tensor([1, 6])}
    data = images(8)
    changed, units, done = fitted(model, removed, data)
    assert set(done.fits) == {'head.first', 'head.second', 'head.pred'}
    assert done.incomplete == []
    with channels_off(changed, units, removed):
        inputs = emitted(changed, 'head.first', data, inputs=True)
        found = [changed(batch) for batch in data]
    wanted = emitted(model, 'head.first', data)
    # The calls take turns: eight by eight places of four images, then a quarter of them
    level = np.tile(np.repeat([0, 1], [256, 64]), 8)
    indicators = np.eye(2)[level] if separate else np.ones((len(level), 1))
    kept = [0, 2, 3, 4, 5, 7]
    solution = np.linalg.lstsq(np.column_stack((inputs[:, kept], indicators)),
                               wanted - (0 if separate else model.head.first.bias.detach().numpy()),
                               rcond=None)[0]
    weight = changed.head.first.weight.detach()[:, kept, 0, 0]
    assert np.allclose(weight, solution[:6].T, atol=1e-6)
    if separate:
        for number, norms in enumerate(changed.head.norms):
            before = model.head.norms[number][0].running_mean
            assert np.allclose(before - norms[0].running_mean, solution[6 + number], atol=1e-6)
    else:
        assert np.allclose(changed.head.first.bias.detach(), solution[6]
                           + model.head.first.bias.detach().numpy(), atol=1e-6)
    # The second is fitted to what the first emits in the end
    plain = copy.deepcopy(model)
    with channels_off(plain, units, removed):
        errors = [sum(float((one - other).square().sum()) for batch, outputs in zip(data, runs)
                      for one, other in zip(model(batch), outputs))
                  for runs in (found, [plain(batch) for batch in data])]
    assert errors[0] < 0.5 * errors[1]


def test_without_norm_or_bias():
    """A layer without either is fitted without an offset, and reported."""
    model = chain(b=nn.Conv2d(8, 6, 1, bias=False), c=Block(6, 5))
    data, removed = images(), {'a.conv': torch.tensor([0, 5])}
    changed, units, done = fitted(model, removed, data)
    assert done.incomplete == ['b'] and done.fits['b'] == 'kernel'
    with channels_off(changed, units, removed):
        inputs = emitted(changed, 'b', data, inputs=True)[:, [1, 2, 3, 4, 6, 7]]
    matrix = np.linalg.lstsq(inputs, emitted(model, 'b', data), rcond=None)[0].T
    assert np.allclose(changed.b.weight.detach()[:, [1, 2, 3, 4, 6, 7], 0, 0], matrix, atol=1e-6)


class Repeated(nn.Module):
    """A RepVGG block: BatchNorms of two convolutions, and of what the block reads."""

    def __init__(self):
        super().__init__()
        self.one, self.three = Block(8, 8, 1, nn.Identity), Block(8, 8, 3, nn.Identity)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return (self.one(x) + self.three(x) + self.norm(x)).relu()


def test_norms_of_other_things_stay():
    model = chain(b=Repeated(), c=Block(8, 5))
    units, _ = find_units(model, SHAPE)
    removed = {units[0].name: torch.tensor([1, 3])}
    changed, _, done = fitted(model, removed, images())
    assert changes(changed.b, model.b) == {
        f'{name}.{key}' for name in ('one', 'three') for key in ('conv.weight', 'bn.running_mean')}
    assert done.incomplete == []


def test_norm_behind_two_layers():
    """Neither may move its mean."""
    def run(net, x):
        x = net.a(x)
        return net.pred(net.norm(net.one(x)) + net.norm(net.other(x)))

    model = build(run, a=Block(3, 8), one=nn.Conv2d(8, 4, 1), other=nn.Conv2d(8, 4, 1, bias=False),
                  norm=nn.BatchNorm2d(4), pred=nn.Conv2d(4, 2, 1))
    changed, _, done = fitted(model, {'a.conv': torch.tensor([1, 3])}, images())
    assert changes(changed, model) == {'one.weight', 'one.bias', 'other.weight', 'pred.weight',
                                       'pred.bias'}
    assert done.incomplete == ['other']


def test_norm_without_running_statistics():
    model = chain()
    model.b.bn = nn.BatchNorm2d(6, track_running_stats=False).double().eval()
    changed, _, done = fitted(model, {'a.conv': torch.tensor([1, 3])}, images())
    assert 'b.conv' in done.fits and done.incomplete == []
    assert not any(name.startswith('b.bn') for name in changes(changed, model))


def test_layer_that_also_runs_before():
    """A layer that runs before and after the first change keeps what it computes at first."""
    def run(net, x):
        x = net.twice(net.a(x)).relu()
        return net.pred(net.twice(net.c(net.b(x))))

    model = build(run, a=Block(3, 5), twice=nn.Conv2d(5, 5, 1), b=Block(5, 8), c=Block(8, 5),
                  pred=nn.Conv2d(5, 2, 1))
    changed, _, done = fitted(model, {'b.conv': torch.tensor([2, 3])}, images(), 1e-2)
    assert set(done.fits) == {'c.conv', 'twice', 'pred'}
    assert not torch.equal(changed.twice.weight, model.twice.weight)


@pytest.mark.parametrize('sizes', [(2, 2, 2, 2), (4, 4), (8, )])
def test_batches_do_not_matter(sizes, monkeypatch):
    monkeypatch.setattr(rounds, 'PLACES', 30)
    model, removed = chain(), {'a.conv': torch.tensor([1, 3])}
    batch = torch.cat(images())
    expected, _, _ = fitted(model, removed, list(batch.split(1)), 1e-2)
    found, _, _ = fitted(model, removed, list(batch.split(sizes)), 1e-2)
    for name, value in found.state_dict().items():
        assert torch.allclose(value, expected.state_dict()[name], atol=1e-9)
    more, _, _ = fitted(model, removed, list(batch.flip(0).split(sizes)), 1e-2)
    assert not torch.allclose(more.b.conv.weight, expected.b.conv.weight, atol=1e-9)


def test_rounds_add_up(monkeypatch):
    """The first layer has all images in the end; more rounds take no more memory."""
    model, removed = chain(), {'a.conv': torch.tensor([1, 3])}
    expected, _, _ = fitted(model, removed, images(20), 1e-2)
    monkeypatch.setattr(rounds, 'ROUND_IMAGES', 4)
    sizes = []

    def watched():
        for number, batch in enumerate(images(20)):
            if number in (2, 19):
                gc.collect()
                sizes.append(sum(item.numel() for item in gc.get_objects()
                                 if type(item) in (torch.Tensor, nn.Parameter)))
            yield batch

    found, _, _ = fitted(model, removed, watched(), 1e-2)
    assert torch.allclose(found.b.conv.weight, expected.b.conv.weight, atol=1e-9)
    assert not torch.allclose(found.c.conv.weight, expected.c.conv.weight, atol=1e-9)
    assert sizes[1] <= sizes[0]


def test_images_of_different_sizes():
    model, removed = chain(), {'a.conv': torch.tensor([1, 3])}
    data = [*images(1, 8), *images(1, 12), torch.rand(4, 3, 10, 6).double()]
    plain = copy.deepcopy(model)
    changed, units, _ = fitted(model, removed, data, 1e-3)
    errors = {}
    for net in (changed, plain):
        with channels_off(net, units, removed):
            errors[net] = sum(float((net(batch) - model(batch)).square().sum()) for batch in data)
    assert errors[changed] < 0.3 * errors[plain]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, removed = chain(), {'a.conv': torch.tensor([1, 3])}
    data = images()
    expected, _, _ = fitted(model, removed, data, 50)
    half = copy.deepcopy(model).to(dtype)
    try:
        half(data[0])
    except RuntimeError:
        pytest.skip('this PyTorch has no convolutions of it on the CPU')
    changed, _, _ = fitted(half, removed, data, 50)
    assert changed.b.conv.weight.dtype == dtype
    assert torch.allclose(changed.b.conv.weight.double(), expected.b.conv.weight, atol=0.05)
    assert not torch.allclose(changed.b.conv.weight, half.b.conv.weight, atol=0.05)


def test_no_images():
    model = chain()
    state = copy.deepcopy(model.state_dict())
    for data in ([], None):
        with pytest.raises(PruningError, match='images'):
            prune(model, ratio=0.4, compensate='reconstruct', calibration=data, input_shape=SHAPE)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_errors_restore_the_model():
    """Also weights that have been fitted already, and the modes and hooks of both models."""
    model = chain().train()
    state = copy.deepcopy(model.state_dict())

    def data():
        raise KeyboardInterrupt

    def fits(*_):
        assert not torch.equal(model.b.conv.weight, state['b.conv.weight'])

    class Data:
        def __iter__(self):
            yield from images(10)
            fits()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, ratio=0.4, calibration=Data(), input_shape=SHAPE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and not any(module._forward_pre_hooks or module._forward_hooks
                                      for module in model.modules())

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The least squares compensation, against numpy and against what must come back exactly."""
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, difference, randomise, run

from mmgcp.errors import PruningError
from mmgcp.pruning import prune
from mmgcp.pruning.compensation import norms
from mmgcp.pruning.compensation.norms import adapt_norms

SHAPE = (3, 16, 16)
LAST = [dict(name='a', modules=['a'], threshold=0.5)]


def images(number=2, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 3, size, size, generator=generator, dtype=torch.double)
            for _ in range(number)]


def chain(seed=0, **layers):
    """a -> b -> pred; the first two channels of a are to go."""
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 8),
                          b=layers.get('b', Block(8, 5)), pred=nn.Conv2d(5, 2, 1)), seed)
    with torch.no_grad():
        model.a.bn.weight[:] = torch.tensor([.1, .2] + [1.] * 6)
        for block in (model.a, model.b):
            if isinstance(block, Block):
                block.bn.eps = 1e-10
    return model.double().eval()


def outputs_of(model, name, data):
    """All values (C, N) of a layer."""
    found = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, args, output: found.append(output.detach().transpose(0, 1).flatten(1)))
    for batch in data:
        model(batch)
    handle.remove()
    return torch.cat(found, 1)


def pruned(model, data, mode, groups=LAST):
    model = copy.deepcopy(model)
    return model, prune(model, groups, compensate=mode, calibration=data, input_shape=SHAPE)


def test_least_squares_of_numpy():
    """The first BatchNorm behind emits the best line through old outputs over new inputs."""
    model, data = chain(), images(1)
    assert 4 * 6 * 6 <= norms.NUM_SAMPLES
    without, _ = pruned(model, data, False)
    with_it, result = pruned(model, data, 'adapt-norms')
    assert result.channels_after['a.conv'] == [3, 6]
    inputs, wanted = outputs_of(without, 'b.conv', data), outputs_of(model, 'b.bn', data)
    found = outputs_of(with_it, 'b.bn', data)
    changed = 0
    for new, old, emitted in zip(inputs, wanted, found):
        columns = np.stack([new.numpy(), np.ones(len(new))], 1)
        (slope, offset), *_ = np.linalg.lstsq(columns, old.numpy(), rcond=None)
        assert np.allclose(emitted.numpy(), slope * new.numpy() + offset, atol=1e-6)
        changed += abs(slope - 1) > 0.05
    assert changed


def test_redundant_channels_cost_nothing():
    """What a kept channel carries, too, comes back exactly, whatever the factor and offset."""
    model, data = chain(), images()
    with torch.no_grad():  # all of b's kernels see the same pattern of the equal channels
        model.a.conv.weight[:] = model.a.conv.weight[2]
        model.a.bn.weight[2:] = 1.
        model.a.bn.bias[:] = 0.3
        model.a.bn.running_mean[:] = model.a.bn.running_mean[2]
        model.a.bn.running_var[:] = model.a.bn.running_var[2]
        model.a.act = model.b.act = nn.Identity()
        model.b.conv.weight.abs_()
    before = [model(batch) for batch in data]
    errors = {}
    for mode in (False, 'fold-means', 'adapt-norms'):
        after = [pruned(model, data, mode)[0](batch) for batch in data]
        errors[mode] = max(difference([old], [new]) for old, new in zip(before, after))
    assert errors['adapt-norms'] < 1e-6 < 1e-3 < errors['fold-means'] < errors[False]


def test_an_unchanged_model_stays_what_it_was():
    model = chain()
    state = copy.deepcopy(model.state_dict())
    adapt_norms(model, copy.deepcopy(model), images())
    for name, value in model.state_dict().items():
        assert torch.allclose(value, state[name], rtol=1e-6, atol=1e-9), name


def test_layers_before_the_pruned_ones_stay():
    model, data = chain(), images()
    after, _ = pruned(model, data, 'adapt-norms', [dict(name='b', modules=['b'], ratio=0.4)])
    for name, value in model.a.state_dict().items():
        assert torch.allclose(value, after.a.state_dict()[name], rtol=1e-6), name


def test_lost_signals_become_their_mean():
    """A channel whose new inputs have nothing to do with the old ones does not add noise."""
    model, reference, data = chain(), chain(), images(4, 16)
    noise = torch.Generator().manual_seed(1)
    model.b.conv.register_forward_hook(
        lambda _, args, output: torch.randn(output.shape, generator=noise, dtype=torch.double))
    adapt_norms(model, reference, data)
    wanted, found = (outputs_of(net, 'b.bn', data) for net in (reference, model))
    assert (found.std(1) < 0.15 * wanted.std(1)).all()
    assert torch.allclose(found.mean(1), wanted.mean(1), atol=0.02)


def deep_chain(depth=12):
    """Many layers without anything that keeps variances, with statistics of the data."""
    blocks = [Block(3, 16), *[Block(16, 16, 3) for _ in range(depth)]]
    model = randomise(Toy(lambda net, x: net.pred(net.body(x)), body=nn.Sequential(*blocks),
                          pred=nn.Conv2d(16, 2, 1))).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model.train()
    for batch in images(4, 16):
        model(batch)
    return model.eval()


def test_errors_do_not_add_up():
    """Through many layers and on other images, it is better than the means alone."""
    model, data, unseen = deep_chain(), images(4, 16), images(2, 16, seed=9)
    groups = [dict(name='all', modules=['body'], ratio=0.3)]
    before, errors = outputs_of(model, 'pred', unseen), {}
    for mode in ('fold-means', 'adapt-norms', 'reconstruct'):
        after = outputs_of(pruned(model, data, mode, groups)[0], 'pred', unseen)
        errors[mode] = float((after - before).square().mean())
    assert errors['adapt-norms'] < 0.8 * errors['fold-means']
    assert errors['reconstruct'] < 0.9 * errors['adapt-norms']


class Shared(nn.Module):
    """A BatchNorm behind two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.one(x)) + self.bn(self.other(x))


def test_shared_norms_are_left_alone():
    model = chain(b=Shared())
    model.pred = nn.Conv2d(4, 2, 1).double()
    changed = copy.deepcopy(model)
    changed.a.conv.weight.data *= 0.5
    state = copy.deepcopy(changed.state_dict())
    adapt_norms(changed, model, images())
    for name, value in changed.b.bn.state_dict().items():
        assert torch.equal(value, state[f'b.bn.{name}']), name
    assert not torch.equal(changed.a.bn.running_var, state['a.bn.running_var'])


@pytest.mark.parametrize('options, adapted', [
    (dict(affine=False), {'running_mean', 'running_var'}),
    (dict(track_running_stats=False), set())])
def test_norms_without_scales_or_statistics(options, adapted):
    model = chain()
    model.b.bn = nn.BatchNorm2d(5, **options).double()
    model.eval()
    state, data = copy.deepcopy(model.b.bn.state_dict()), images()
    changed = copy.deepcopy(model)
    changed.a.conv.weight.data[:4] *= 0.3
    adapt_norms(changed, model, data)
    assert {name for name, value in changed.b.bn.state_dict().items()
            if not torch.equal(value, state[name])} == adapted


def test_interruption_leaves_no_traces():
    model = chain()
    changed = copy.deepcopy(model)
    changed.a.conv.weight.data *= 0.5
    state = copy.deepcopy(changed.state_dict())

    def broken(_, args):
        raise KeyboardInterrupt

    handle = changed.pred.register_forward_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        adapt_norms(changed.train(), model, images())
    handle.remove()
    assert changed.training and changed.a.bn.training
    for name, value in changed.state_dict().items():
        assert torch.equal(value, state[name]), name
    hooks = [module for net in (model, changed) for module in net.modules()
             if module._forward_pre_hooks]
    assert not hooks


def test_modes():
    """True stands for the best that is possible; the plan says what was asked for."""
    model, data = chain(), images()
    results = {mode: run(pruned(model, data, mode)[0], 16)
               for mode in (True, 'reconstruct', 'adapt-norms', 'fold-means', False)}
    assert difference(results[True], results['reconstruct']) == 0
    for first, second in itertools.combinations(list(results)[1:], 2):
        assert difference(results[first], results[second]) > 1e-6
    without = [run(pruned(model, None, mode)[0], 16) for mode in (True, 'fold-means')]
    assert difference(*without) == 0
    assert pruned(model, data, 'fold-means')[1].plan.options['compensate'] == 'fold-means'


@pytest.mark.parametrize('mode, message', [
    ('squares', 'compensate must be one of .* but is .squares'),
    *((mode, f'{mode}. needs calibration images, but there are none .--calib-batches')
      for mode in ('adapt-norms', 'reconstruct'))])
def test_impossible_modes(mode, message):
    model = chain()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=message):
        prune(model, LAST, compensate=mode, input_shape=SHAPE)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name

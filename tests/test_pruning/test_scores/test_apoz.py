# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from loss_toys import (
    SHAPE,
    assert_as_before,
    make_batches,
    make_toy,
    prepared,
    relu_block,
    silent,
    snapshot,
)
from pruning_samples import Block, Toy, randomise

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import ChannelSlice, ChannelUnit
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.scores import APoZ
from mmgcp.registry import TASK_UTILS


def scored(model, batches=None, **options):
    units, _ = find_units(model.eval(), SHAPE)
    batches = batches or make_batches(3, 2)
    scores = prepared(APoZ(**options), model.double(), units, batches)
    assert all(list(values) == [name] for name, values in scores.items())
    return {name: values[name] for name, values in scores.items()}


def images():
    return torch.cat([batch.images for batch in make_batches(3, 2)])


def nonzero_shares(*maps):
    """The share of values that are not zero in maps (N, C, H, W), by counting."""
    shares = []
    for channel in range(maps[0].shape[1]):
        values = np.concatenate([item[:, channel].detach().numpy().ravel() for item in maps])
        shares.append(sum(value != 0 for value in values.tolist()) / len(values))
    return shares


def test_zeros_behind_relu():
    model = randomise(Toy(lambda net, x: net.pred(net.b(net.a(x))), a=relu_block(3, 6, 3),
                          b=relu_block(6, 5, 3, stride=2), pred=nn.Conv2d(5, 2, 1)))
    found = scored(model)
    with torch.no_grad():
        first = model.a(images())
        second = model.b(first)
    assert found['a.conv'].tolist() == pytest.approx(nonzero_shares(first), abs=1e-12)
    assert found['b.conv'].tolist() == pytest.approx(nonzero_shares(second), abs=1e-12)
    assert 0.1 < found['a.conv'].min() < found['a.conv'].max() <= 1


def test_what_all_readers_see():
    """Behind a shortcut, a pooling and a concatenation, at different sizes."""
    def run(net, x):
        x = net.stem(x)
        x = x + net.b(net.a(x))
        x = torch.cat((F.max_pool2d(x, 2), F.relu(net.c(x))[..., ::2, ::2]), 1)
        return net.pred(x)

    model = randomise(Toy(run, stem=relu_block(3, 6), a=relu_block(6, 4, 3), b=relu_block(4, 6),
                          c=nn.Conv2d(6, 3, 1), pred=nn.Conv2d(9, 2, 1)))
    found = scored(model)
    with torch.no_grad():
        stem = model.stem(images())
        inside = model.a(stem)
        outside = stem + model.b(inside)
        branch = F.relu(model.c(outside))[..., ::2, ::2]
    expected = {'stem.conv': nonzero_shares(stem, outside, F.max_pool2d(outside, 2)),
                'a.conv': nonzero_shares(inside), 'c': nonzero_shares(branch)}
    assert set(found) == set(expected)
    for name, shares in expected.items():
        assert found[name].tolist() == pytest.approx(shares, abs=1e-12)


def test_linear_layer_behind_all_positions():
    model = randomise(Toy(lambda net, x: net.pred(net.a(x).flatten(1)), a=relu_block(3, 4),
                          pred=nn.Linear(4 * 64, 2)))
    found = scored(model)['a.conv'].tolist()
    assert found == pytest.approx(nonzero_shares(model.a(images())), abs=1e-12)


@pytest.mark.parametrize('act', [nn.SiLU, nn.LeakyReLU, nn.Mish])
def test_activations_that_are_never_zero(act):
    model = randomise(Toy(lambda net, x: net.pred(net.a(x)), a=Block(3, 6, 3, act),
                          pred=nn.Conv2d(6, 2, 1)))
    values = model.double().eval().a(images()).detach()
    assert (values != 0).all()
    for options, alive in ((dict(), values > 0), (dict(zero_thr=0.1), values > 0.1),
                           (dict(zero='magnitude'), values != 0),
                           (dict(zero='magnitude', zero_thr=0.1), values.abs() > 0.1)):
        assert scored(model, **options)['a.conv'].tolist() == pytest.approx(
            alive.double().mean((0, 2, 3)).tolist(), abs=1e-12)


def test_batches_do_not_matter():
    scores = [scored(make_toy('residual')[0].float(), make_batches(*sizes))
            for sizes in ((6, ), (2, 4), (1, ) * 6)]
    for name, values in scores[0].items():
        assert torch.equal(values, scores[1][name]) and torch.equal(values, scores[2][name])


def test_model_stays_and_second_run_is_the_same():
    model, units = make_toy('concat')
    model.train()
    model.b.eval()
    before = snapshot(model)
    first, second = (prepared(APoZ(), model, units, make_batches(3, 3)) for _ in range(2))
    assert_as_before(model, before)
    assert all(torch.equal(values, second[name][name])
               for name, scores in first.items() for values in scores.values())


def test_channels_that_nothing_reads():
    model, _ = make_toy('chain')
    half = torch.arange(3)
    unit = ChannelUnit('a.conv', 6, (
        ChannelSlice('a.conv', 'out', torch.arange(6), torch.arange(6)),
        ChannelSlice('b.conv', 'in', half, half)))
    unread = ChannelUnit('b.conv', 5, (
        ChannelSlice('b.conv', 'out', torch.arange(5), torch.arange(5)), ))
    scores = prepared(APoZ(), model, [unit, unread], make_batches(2))
    assert scores['a.conv']['a.conv'].isnan().tolist() == [False] * 3 + [True] * 3
    assert scores['b.conv'] == {}


def test_progress():
    model, units = make_toy('chain')
    seen = []
    APoZ().prepare(model, units, make_batches(2, 2, 1), lambda *args: seen.append(args))
    assert seen == [('scoring', done, 3) for done in range(4)]


def test_fewer_batches_than_announced():
    class Announced:
        def __iter__(self):
            return iter(make_batches(2, 1))

        def __len__(self):
            return 5

    model, units = make_toy('chain')
    seen = []
    APoZ().prepare(model, units, Announced(), lambda *args: seen.append(args[1:]))
    assert seen == [(0, 5), (1, 5), (2, 5), (2, 2)]
    seen.clear()
    APoZ().prepare(model, units, (batch for batch in make_batches(2, 1)),
                   lambda *args: seen.append(args[1:]))
    assert seen == [(0, 0), (1, 1), (2, 2)]


def test_no_batches():
    model, units = make_toy('chain')
    with pytest.raises(PruningError, match='there are no batches of training data to score'):
        APoZ().prepare(model, units, [], silent)


def test_hooks_go_when_the_model_fails():
    model, units = make_toy('chain')
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        APoZ().prepare(model, units, [Batch(torch.zeros(1, 4, 8, 8), {})], silent)
    assert_as_before(model, before)


def test_options():
    criterion = TASK_UTILS.build(dict(type='mmgcp.APoZ', zero='magnitude', zero_thr=0.01))
    assert (criterion.zero, criterion.zero_thr, criterion.needs) == ('magnitude', 0.01, 'images')
    with pytest.raises(PruningError, match="zero must be one of .*, but is 'negative'"):
        APoZ(zero='negative')
    with pytest.raises(PruningError, match='zero_thr must be .* but is -1'):
        APoZ(zero_thr=-1)

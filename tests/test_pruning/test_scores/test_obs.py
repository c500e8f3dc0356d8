# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Optimal Brain Surgeon against least squares of numpy and gradients of autograd."""
import numpy as np
import pytest
import torch
import torch.nn as nn
from loss_toys import SHAPE, LossToy, assert_as_before, make_batches, silent, snapshot
from pruning_samples import Block, randomise

from mmgcp.errors import PruningError
from mmgcp.nn.sampling import Places
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.scores import OBS
from mmgcp.pruning.scores import readers as readers_module
from mmgcp.pruning.scores.readers import make_readers

RIDGE = 1e-2
LAYERS = dict(
    plain=lambda: nn.Conv2d(5, 4, 3, padding=1), strided=lambda: nn.Conv2d(5, 4, 2, stride=2),
    pointwise=lambda: nn.Conv2d(5, 4, 1, bias=False),
    grouped=lambda: nn.Conv2d(6, 4, 3, groups=2), linear=lambda: nn.Linear(5, 4))


def everywhere(maps):
    """All places of feature maps."""
    count, height, width = maps.shape[:3]
    image, row, column = torch.meshgrid(torch.arange(count), torch.arange(height),
                                        torch.arange(width), indexing='ij')
    return Places(image.flatten(), row.flatten(), column.flatten())


def seen(name):
    """A layer with its readers after a batch, the rows that it reads, and factors of outputs."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    inputs = torch.rand(3, 6, 7, 8, generator=generator, dtype=torch.double)
    inputs[:, 1] += 0.7 * inputs[:, 0] + 3  # channels are correlated and have means
    if isinstance(layer, nn.Linear):
        inputs = inputs[:, :5].permute(0, 2, 3, 1)
        rows = inputs.reshape(-1, 5)[:, :, None]
    else:
        inputs = inputs[:, :layer.in_channels]
        unfolded = nn.functional.unfold(inputs, layer.kernel_size, padding=layer.padding,
                                        stride=layer.stride)
        rows = unfolded.transpose(1, 2).reshape(-1, layer.in_channels, layer.weight[0, 0].numel())
    output = layer(inputs)
    gradient = torch.rand(output.shape, generator=generator, dtype=torch.double)
    found = make_readers(layer)
    for reader in found:
        reader.see(inputs, output, everywhere)
        reader.see_gradient(gradient)
        reader.join(lambda value: value, len(inputs))
        reader.begin(RIDGE)
    dim = -1 if isinstance(layer, nn.Linear) else 1
    others = [index for index in range(4) if index != dim % 4]
    return layer, found, rows.numpy(), (gradient.square().sum(others) / len(inputs)).numpy()


def error_without(layer, rows, factors, group, groups, gone):
    """The weighted error of the outputs of a group with the best weights without channels.

    By ordinary least squares: rows for the ridge make the covariance what it is with it.
    """
    width = rows.shape[1] // groups
    rows = rows[:, group * width:(group + 1) * width]
    taps = rows.shape[2]
    columns = rows.reshape(len(rows), -1)
    columns = columns - columns.mean(0)
    variance = (columns**2).mean()
    extra = np.sqrt((RIDGE * variance + 1e-12) * len(columns)) * np.eye(columns.shape[1])
    columns = np.concatenate((columns, extra))
    height = len(layer.weight) // groups
    weight = layer.weight.detach().numpy()[group * height:(group + 1) * height]
    targets = columns @ weight.reshape(height, -1).T
    kept = [channel * taps + tap for channel in range(width) if channel not in gone
            for tap in range(taps)]
    best = np.linalg.lstsq(columns[:, kept], targets, rcond=None)[0]
    errors = ((columns[:, kept] @ best - targets)**2).sum(0) / len(rows)
    return float((errors * factors[group * height:(group + 1) * height]).sum())


@pytest.mark.parametrize('name', LAYERS)
def test_costs_are_errors_of_least_squares(name):
    layer, found, rows, factors = seen(name)
    for group, reader in enumerate(found):
        costs = reader.costs()
        width = rows.shape[1] // len(found)
        assert int((~costs.isnan()).sum()) == width
        expected = [error_without(layer, rows, factors, group, len(found), {channel})
                    for channel in range(width)]
        np.testing.assert_allclose(costs[group * width:(group + 1) * width], expected, rtol=1e-6)


@pytest.mark.parametrize('name', LAYERS)
def test_costs_add_up_to_the_error_without_several(name):
    layer, found, rows, factors = seen(name)
    reader, total = found[0], 0.
    for channel in (2, 0):
        total += float(reader.costs()[channel])
        reader.remove(torch.tensor([channel]), 'in')
    expected = error_without(layer, rows, factors, 0, len(found), {0, 2})
    assert total == pytest.approx(expected, rel=1e-6)


def test_several_at_once_are_as_good_as_one_by_one():
    (_, (first, ), *_), (_, (second, ), *_) = seen('plain'), seen('plain')
    first.remove(torch.tensor([0, 3]), 'in')
    for channel in (3, 0):
        second.remove(torch.tensor([channel]), 'in')
    left = [1, 2, 4]
    torch.testing.assert_close(first.costs()[left], second.costs()[left])


def test_outputs_that_went_do_not_count():
    layer, (reader, ), rows, factors = seen('plain')
    reader.remove(torch.tensor([1, 3]), 'out')
    factors[[1, 3]] = 0
    assert float(reader.costs()[0]) == pytest.approx(
        error_without(layer, rows, factors, 0, 1, {0}), rel=1e-6)


def test_large_kernels_take_taps_as_uncorrelated(monkeypatch):
    monkeypatch.setattr(readers_module, 'MAX_COLUMNS', 8)
    torch.manual_seed(0)
    layer = LAYERS['plain']().double()
    reader, = make_readers(layer)
    inputs = torch.rand(3, 5, 7, 8, dtype=torch.double)
    reader.see(inputs, layer(inputs), everywhere)
    reader.squares += 2.
    reader.join(lambda value: value, 1)
    reader.begin(RIDGE)
    values = inputs.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    covariance = np.cov(values.T, bias=True)
    covariance += np.eye(5) * (RIDGE * np.trace(covariance) / 5 + 1e-12)
    left = 1 / np.linalg.inv(covariance).diagonal()  # variance that other channels cannot explain
    energy = 2 * layer.weight.detach().square().sum((0, 2, 3)).numpy()
    np.testing.assert_allclose(reader.costs(), energy * left, rtol=1e-6)


def toy():
    """The second layer reads a copy of a channel, with another scale, and a constant one."""
    model = randomise(LossToy(lambda net, x: net.pred(net.b(net.a(x))), a=Block(3, 8, 3),
                              b=Block(8, 6, 3), pred=nn.Conv2d(6, 2, 1)))
    with torch.no_grad():
        for value in (*model.a.bn.parameters(), *model.a.bn.buffers()):
            if value.dim():
                value[5] = value[2]
        model.a.conv.weight[5] = model.a.conv.weight[2]
        model.a.bn.weight[7] = 0.
    return model


def scores_of(model, **options):
    units, _ = find_units(model, SHAPE)
    criterion = OBS(**options)
    criterion.prepare(model, units, make_batches(4, 4), silent)
    return {unit.name: criterion(model, unit)[unit.name] for unit in units}


@pytest.mark.parametrize('spread', [1e-3, 1e-5, 0.])
def test_inputs_that_hardly_vary(spread):
    """As after a sparse training: their means, which are large, cancel in single precision."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Conv2d(5, 4, 1)
    noise = torch.randn(4, 5, 6, 6, generator=generator, dtype=torch.double)
    inputs = (100 + spread * noise).float()
    reader, = make_readers(layer)
    for batch in inputs.split(2):
        reader.see(batch, layer(batch), everywhere)
    reader.see_gradient(torch.ones(1, 4, 6, 6))
    reader.join(lambda value: value, 4)
    reader.begin(RIDGE)
    samples = inputs.double().permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    covariance = np.cov(samples.T, bias=True)
    covariance += (RIDGE * covariance.diagonal().mean() + 1e-8) * np.eye(5)
    expected = ((layer.weight.detach()[:, :, 0, 0].double().numpy()**2).sum(0) * 36
                / np.linalg.inv(covariance).diagonal())
    np.testing.assert_allclose(reader.costs().numpy(), expected / 4, rtol=2e-2)


def test_inputs_that_are_always_zero():
    layer = nn.Conv2d(3, 2, 3)
    reader, = make_readers(layer)
    reader.see(torch.zeros(1, 3, 5, 5), layer(torch.zeros(1, 3, 5, 5)), everywhere)
    reader.see_gradient(torch.ones(1, 2, 3, 3))
    reader.join(lambda value: value, 1)
    reader.begin(RIDGE)
    assert (reader.costs() < 1e-20).all()
    reader.remove(torch.tensor([1]), 'in')
    assert reader.costs()[[0, 2]].isfinite().all()


def test_what_others_can_make_up_for_goes_first():
    model = toy().double().eval()
    before = snapshot(model)
    scores = scores_of(model)
    assert_as_before(model, before)
    assert set(scores) == {'a.conv', 'b.conv'}
    order = scores['a.conv'].argsort().tolist()
    assert order[0] == 7 and (order[1] in (2, 5))
    assert (order.index(2) - order.index(5))**2 > 1, 'one of two equal channels has to stay'
    torch.testing.assert_close(torch.cat(list(scores.values())).mean(), torch.tensor(1.).double())


def test_wrong_ridge():
    with pytest.raises(PruningError, match='ridge must be .* but is 0'):
        OBS(ridge=0)


def test_no_batches():
    model = toy().double().eval()
    units, _ = find_units(model, SHAPE)
    with pytest.raises(PruningError, match='no batches of training data'):
        OBS().prepare(model, units, [], silent)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import weakref

import pytest
import torch
import torch.nn as nn
from pruning_samples import Block, Toy, randomise

from mmgcp.pruning.compensation.statistics import ChannelStatistics, measure_inputs


def toy():
    return randomise(Toy(lambda net, x: net.b(net.a(x)), a=Block(3, 4), b=Block(4, 5))).eval()


def random_images(*sizes):
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(2, 3, size, size, generator=generator) for size in sizes]


def test_statistics_of_several_batches():
    model, images = toy(), random_images(8, 16, 8)
    statistics = measure_inputs(model, {'b.conv': torch.tensor([3, 1])}, images)
    assert list(statistics) == ['b.conv'] and list(statistics['b.conv']) == [(model.b.bn, )]
    found = statistics['b.conv'][model.b.bn, ]
    with torch.no_grad():
        inputs = torch.cat([model.a(image)[:, [3, 1]].transpose(0, 1).flatten(1)
                            for image in images], 1)
    assert torch.equal(found.low, inputs.min(1).values)
    assert torch.equal(found.high, inputs.max(1).values)
    assert torch.allclose(found.mean, inputs.double().mean(1), rtol=0, atol=1e-7)
    assert found.count == inputs.shape[1]
    assert found.constant.isnan().all()


def test_constant_channels():
    values = torch.tensor([[2., 2., 2.], [2., 2.1, 2.], [1e4, 1e4, 1e4 + 0.1], [0., 0., 0.]])
    found = ChannelStatistics.of(values, 0)
    assert found.constant[[0, 3]].tolist() == [2., 0.]
    assert found.constant[2] == pytest.approx(1e4, abs=0.1)
    assert found.constant[1].isnan()
    other = ChannelStatistics.of(values + torch.tensor([[1.], [0.], [0.], [0.]]), 0)
    assert (found + other).constant.isnan().tolist() == [True, True, False, False]
    assert (found + other).mean[0] == 2.5
    assert ChannelStatistics.of(torch.full((1, 999), 0.1), 0).mean == torch.tensor(0.1).double()


def test_memory_does_not_grow():
    model, alive = toy(), []
    model.a.register_forward_hook(lambda *args: alive.append(weakref.ref(args[-1])))
    model.b.conv.register_forward_hook(lambda *args: alive.append(weakref.ref(args[-1])))

    def images():
        for number in range(4):
            assert len(alive) == 2 * number
            assert not any(reference() is not None for reference in alive)
            yield random_images(8)[0]

    measure_inputs(model, {'b.conv': torch.tensor([0])}, images())
    assert len(alive) == 8


def test_layers_that_are_no_consumers_or_do_not_run():
    model = randomise(Toy(lambda net, x: net.b(net.a(x)), a=Block(3, 4),
                          b=nn.Conv2d(4, 4, 3, groups=4), unused=nn.Conv2d(4, 4, 1)))
    channels = dict.fromkeys(['unused', 'a.bn', 'nowhere', 'b'], torch.tensor([0]))
    assert measure_inputs(model, channels, random_images(8)) == {}


def test_model_is_restored_after_a_failure():
    model = toy().train()
    with pytest.raises(RuntimeError):
        measure_inputs(model, {'b.conv': torch.tensor([0])}, [torch.zeros(1, 4, 8, 8)])
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks
                   for module in model.modules())

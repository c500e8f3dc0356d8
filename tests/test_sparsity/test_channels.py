# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from torch import nn

from mmgcp.sparsity.channels import Channels, Coupling, LayerScales
from mmgcp.sparsity.penalties import add_subgradient, shrink


def layer(values, name='bn', **kwargs):
    gamma = nn.Parameter(torch.tensor(values))
    gamma.grad = torch.zeros_like(gamma)
    return LayerScales(name, gamma, **kwargs)


def apply(penalty, layers, rate, lr=0.5):
    gammas = [item.gamma for item in layers]
    optimizer = torch.optim.SGD(gammas, lr=lr)
    penalty(Channels(layers), rate, {id(gamma) for gamma in gammas}, optimizer)


@pytest.mark.parametrize('seed', range(5))
def test_coupling_against_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    segments = torch.randint(0, 12, (30, ), generator=generator)
    segments[3] = 77
    values = torch.randn(30, generator=generator)
    found = Coupling(segments).root_mean_square(values)
    for index, segment in enumerate(segments):
        members = values[segments == segment]
        torch.testing.assert_close(found[index], members.square().mean().sqrt())
    assert found[3] == values[3].abs()


def test_channels_on_their_own_are_exact():
    values = torch.tensor([1e-30, -1e-25, 0., 0.1, -3.])
    assert torch.equal(Coupling(torch.arange(5)).root_mean_square(values), values.abs())


def test_one_channel_in_two_layers_by_hand():
    """The penalty is rate * sqrt(2) * ||(3, 4)||, so that its gradient is sqrt(2) (3, 4) / 5."""
    layers = [layer([3., -2.], segments=torch.tensor([0, 1])),
              layer([-4.], segments=torch.tensor([0]))]
    apply(add_subgradient, layers, 0.1)
    torch.testing.assert_close(
        layers[0].gamma.grad, 0.1 * torch.tensor([2**0.5 * 0.6, -1.]))
    torch.testing.assert_close(layers[1].gamma.grad, torch.tensor([-0.1 * 2**0.5 * 0.8]))
    # The norm 5 becomes 5 - lr * rate * sqrt(2)
    apply(shrink, layers, 0.1)
    factor = (5 - 0.5 * 0.1 * 2**0.5) / 5
    torch.testing.assert_close(layers[0].gamma.detach(), torch.tensor([3 * factor, -1.95]))
    torch.testing.assert_close(layers[1].gamma.detach(), torch.tensor([-4 * factor]))
    apply(shrink, layers, 6.)  # 3 sqrt(2) is less than the norm, 3 more than 1.95
    assert layers[0].gamma[1] == 0 and layers[0].gamma[0] > 0
    apply(shrink, layers, 6.)
    assert not layers[0].gamma.any() and not layers[1].gamma.any()


def test_gradient_is_that_of_the_logged_loss():
    generator = torch.Generator().manual_seed(0)
    segments = [torch.tensor([0, 1, 2]), torch.tensor([2, 0]), torch.tensor([0, -1])]
    layers = [layer(torch.randn(len(part), generator=generator).tolist(), segments=part)
              for part in segments]
    gammas = [item.gamma.detach().requires_grad_() for item in layers]
    a, b, c = gammas
    loss = (3**0.5 * torch.stack([a[0], b[1], c[0]]).norm() + a[1].abs()
            + 2**0.5 * torch.stack([a[2], b[0]]).norm() + c[1].abs())
    channels = Channels(layers)
    torch.testing.assert_close(channels.magnitudes(channels.values()).sum(), loss.detach())
    apply(add_subgradient, layers, 1.)
    for item, gradient in zip(layers, torch.autograd.grad(loss, gammas)):
        torch.testing.assert_close(item.gamma.grad, gradient)


@pytest.mark.parametrize('penalty', [add_subgradient, shrink])
def test_coupled_zeros_stay(penalty):
    layers = [layer([0., 1.], segments=torch.tensor([0, 1])),
              layer([-0.], segments=torch.tensor([0]))]
    apply(penalty, layers, 0.1)
    for item in layers:
        assert item.gamma[0] == 0 and item.gamma.grad[0] == 0


def test_channels_that_do_not_take_part():
    item = layer([3., -2., 0.5], chosen=torch.tensor([True, False, True]))
    channels = Channels([item])
    assert channels.values().tolist() == [3., 0.5]
    apply(add_subgradient, [item], 0.1)
    torch.testing.assert_close(item.gamma.grad, torch.tensor([0.1, 0., 0.1]))
    apply(shrink, [item], 2.)
    assert item.gamma.tolist() == [2., -2., 0.]


def test_mean_factor_of_coupled_layers():
    layers = [layer([1., 1.], segments=torch.tensor([0, 1]), rate_factor=3.),
              layer([1.], segments=torch.tensor([0]))]
    torch.testing.assert_close(Channels(layers).rate_factors, torch.tensor([2., 3., 2.]))


def test_groups():
    layers = [layer([1., 2.], group='a'), layer([3.], group='b'),
              layer([4., 5.], group='a', chosen=torch.tensor([False, True]))]
    channels = Channels(layers)
    assert channels.rate_factors is None
    assert {name: channels.values()[mask].tolist() for name, mask in channels.groups.items()} == {
        'a': [1., 2., 5.], 'b': [3.]}

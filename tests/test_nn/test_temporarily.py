# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from contextlib import nullcontext

import pytest
import torch
import torch.nn as nn

from mmgcp.nn.temporarily import (
    eval_mode,
    modes,
    only_values_change,
    requiring_grad,
    restored_on_error,
    values_kept,
)


class Frozen(nn.Module):
    """Has its own idea of train mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self


def modes_of(model):
    return [module.training for module in model.modules()]


def test_modes():
    model = Frozen().train()
    assert modes_of(model) == [True, True, False]
    with pytest.raises(KeyError), modes(model, lambda module: module is not model.conv):
        assert modes_of(model) == [True, False, True]
        raise KeyError
    assert modes_of(model) == [True, True, False]
    with eval_mode(model):
        assert modes_of(model) == [False] * 3
    assert modes_of(model) == [True, True, False]


def test_parameters_that_require_gradients():
    model = Frozen()
    model.bn.weight.requires_grad_(False)
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    with pytest.raises(KeyError), requiring_grad(model, [model.bn.weight, model.conv.weight]):
        assert [name for name, param in model.named_parameters() if param.requires_grad] == [
            'conv.weight', 'bn.weight']
        raise KeyError
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before


@pytest.mark.parametrize('fails', [True, False])
def test_only_values_change(fails):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].eval()
    model[0].bias.requires_grad_(False)
    grad = model[0].weight.grad = torch.ones_like(model[0].weight)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        with only_values_change(model):
            assert all(param.grad is None for param in model.parameters())
            model.train().requires_grad_(True)
            model(torch.ones(2, 3, 4, 4)).sum().backward()
            model[1].weight.data.fill_(3)
            if fails:
                raise KeyboardInterrupt
    assert model[0].training and not model[1].training
    assert [param.requires_grad for param in model.parameters()] == [True, False, True, True]
    assert model[0].weight.grad is grad and grad.eq(1).all() and model[1].bias.grad is None
    assert model[1].weight.eq(3).all() and model[1].num_batches_tracked == 1


def test_values_come_back():
    model = Frozen()
    tensors = model.conv.weight, model.bn.running_mean
    before = [tensor.detach().clone() for tensor in tensors]
    with pytest.raises(KeyError), values_kept(tensors):
        with torch.no_grad():
            model.conv.weight.add_(1)
            model.bn.running_mean.add_(1)
        raise KeyError
    assert torch.equal(model.conv.weight, before[0]) and model.conv.weight.requires_grad
    assert torch.equal(model.bn.running_mean, before[1])


def test_a_model_is_restored_on_errors_only():
    model = Frozen()
    weight, before = model.conv.weight, model.conv.weight.detach().clone()

    def change():
        with torch.no_grad():
            weight.mul_(2)
        model.conv.weight = nn.Parameter(torch.zeros(2, 1, 1, 1))
        model.conv.out_channels = 2

    with pytest.raises(KeyError), restored_on_error(model, weights=True):
        change()
        raise KeyError
    assert model.conv.weight is weight and torch.equal(weight, before)
    assert model.conv.out_channels == 1
    with restored_on_error(model):
        change()
    assert model.conv.out_channels == 2

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.nn.temporarily import eval_mode, modes, requiring_grad, restored_on_error, values_kept


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

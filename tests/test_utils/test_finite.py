# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.nn.finite import first_not_finite
from mmgcp.utils.finite import describe_not_finite

NAN, INF = float('nan'), float('inf')


def make_model():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    model.register_buffer('mask', torch.full((2, ), -INF))  # which may be infinite
    return model


@pytest.mark.parametrize('name', [
    '0.weight', '0.bias', '1.weight', '1.bias', '1.running_mean', '1.running_var', '2.weight'])
@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_values_that_are_not_finite(name, value):
    model = make_model()
    assert describe_not_finite(model) == ''
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state[name].view(-1)[1] = value
    expected = f'{name} has 1 of {state[name].numel()} values that are not finite'
    assert describe_not_finite(model, state) == expected
    assert describe_not_finite(model, {name: state[name]}) == expected
    assert describe_not_finite(model, {}) == describe_not_finite(model) == ''
    model.load_state_dict(state)
    assert describe_not_finite(model) == expected


@pytest.mark.parametrize('variance, eps, fits', [
    (0., 1e-5, True), (0., 0., False), (-1e-6, 1e-5, True), (-1e-5, 1e-5, False),
    (-1., 1e-5, False), (1e-30, 0., True)])
def test_variances(variance, eps, fits):
    """Those that are refused are those with which outputs are not finite."""
    model = make_model()
    model[1].eps = eps
    model[1].running_var[2] = variance
    found = describe_not_finite(model)
    assert (found == '') == fits == bool(model(torch.rand(1, 3, 2, 2)).isfinite().all())
    assert fits or found == (f'1.running_var has a variance of {variance:g}, with which outputs '
                             'are not finite')


class Detector(nn.Module):

    def __init__(self):
        super().__init__()
        self.parts = make_model()

    def forward(self, images, mode):
        return [self.parts(images), {'images': images}]


def test_first_layer_that_emits_them():
    model = Detector()
    assert first_not_finite(model, (3, 8, 8)) == ''
    model.parts[0].bias.data.fill_(3e38)  # finite, as is what the layer emits
    model.parts[1].weight.data.fill_(1e3)
    assert describe_not_finite(model) == ''
    assert first_not_finite(model, (3, 8, 8)) == 'parts.1'

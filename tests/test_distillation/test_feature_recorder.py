# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn

from mmgcp.distillation import FeatureRecorder
from mmgcp.errors import UserError


class Model(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.flatten = nn.Flatten()
        self.unused = nn.ReLU()

    def forward(self, x, times=1):
        for _ in range(times):
            y = self.conv(x)
        return self.flatten(y)


@pytest.fixture
def model():
    return Model()


def num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_record(model):
    x = torch.rand(2, 3, 4, 4)
    with FeatureRecorder(model, ['conv']).record() as features:
        assert num_hooks(model) == 1
        model(x)
    assert list(features) == ['conv'] and torch.equal(features['conv'], model.conv(x))
    assert features['conv'].requires_grad
    assert num_hooks(model) == 0


def test_each_use_has_its_own_features(model):
    recorder = FeatureRecorder(model, ['conv'])
    with recorder.record() as first:
        model(torch.rand(2, 3, 4, 4))
    with recorder.record() as second:
        model(torch.rand(1, 3, 2, 2))
    assert first['conv'].shape == (2, 4, 4, 4) and second['conv'].shape == (1, 4, 2, 2)


def test_replaced_module(model):
    recorder = FeatureRecorder(model, ['conv'])
    model.conv = nn.Conv2d(3, 2, 1)
    with recorder.record() as features:
        model(torch.rand(1, 3, 2, 2))
    assert features['conv'].shape == (1, 2, 2, 2)


def test_missing_module(model):
    with pytest.raises(UserError, match="the teacher has no module 'convs'.*'conv'"):
        FeatureRecorder(model, ['convs'], 'teacher')


def test_module_that_does_not_run(model):
    with pytest.raises(UserError, match="'unused' of the model .* did not run"):
        with FeatureRecorder(model, ['unused']).record():
            model(torch.rand(1, 3, 2, 2))
    assert num_hooks(model) == 0


def test_module_that_runs_twice(model):
    with pytest.raises(UserError, match="'conv' of the model ran more than once"):
        with FeatureRecorder(model, ['conv']).record():
            model(torch.rand(1, 3, 2, 2), times=2)
    assert num_hooks(model) == 0


def test_output_that_is_no_feature_map(model):
    with pytest.raises(UserError, match=r"'flatten' .* but returns a tensor of shape \(1, 16\)"):
        with FeatureRecorder(model, ['flatten']).record():
            model(torch.rand(1, 3, 2, 2))


def test_error_inside_is_not_hidden(model):
    with pytest.raises(ZeroDivisionError):
        with FeatureRecorder(model, ['conv']).record():
            raise ZeroDivisionError
    assert num_hooks(model) == 0


class Overwriting(nn.Module):
    """A batch normalisation whose output its activation may overwrite."""

    def __init__(self, inplace):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.act = nn.LeakyReLU(0.1, inplace=inplace)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


@pytest.mark.parametrize('training', [True, False])
def test_activation_in_place_does_not_change_a_feature(training):
    model, x = Overwriting(inplace=True).train(training), torch.rand(2, 3, 4, 4)
    other = Overwriting(inplace=False).train(training)
    other.load_state_dict(model.state_dict())
    recorders = {net: FeatureRecorder(net, ['bn', 'act']) for net in (model, other)}
    for _ in range(2):  # what the first run shows must not spoil the second
        for net in (model, other):
            net.zero_grad()
            with recorders[net].record() as features:
                net(x)
            features['bn'].square().sum().backward()
            net.recorded = features['bn']
        assert (model.recorded < 0).any()
        assert torch.equal(model.recorded, other.recorded)
        assert torch.equal(model.conv.weight.grad, other.conv.weight.grad)


def test_only_features_that_are_overwritten_are_copies():
    model = Overwriting(inplace=True)
    recorder = FeatureRecorder(model, ['conv', 'bn', 'act'])
    returned = {}
    for name in ('conv', 'bn', 'act'):
        getattr(model, name).register_forward_hook(
            lambda module, args, output, name=name: returned.update({name: output}))
    for _ in range(2):
        with recorder.record() as features:
            model(torch.rand(2, 3, 4, 4))
        assert [name for name in features if features[name] is returned[name]] == ['conv', 'act']


def test_features_under_inference_mode():
    model = Overwriting(inplace=True).eval()
    with torch.inference_mode(), FeatureRecorder(model, ['bn']).record() as features:
        model(torch.rand(2, 3, 4, 4))
    assert (features['bn'] < -0.2).any()

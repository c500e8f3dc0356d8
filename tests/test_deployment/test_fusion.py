# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

import pytest
import torch
import torch.nn as nn
from deployment_samples import narrow_config, narrow_detector
from mmcv.cnn import fuse_conv_bn
from pruning_samples import Block, Toy, difference, randomise, tensors

from mmgcp.deployment import fold_norms, fused
from mmgcp.errors import UserError


def outputs(model, shape=(3, 64, 64)):
    image = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return tensors(model.eval()(image.to(next(model.parameters())), mode='tensor'))


def norms_of(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def double(model):
    return randomise(model).double().eval()


@pytest.mark.parametrize('conv', [
    nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 1, groups=4, bias=False),
    nn.ConvTranspose2d(8, 12, 2, 2), nn.ConvTranspose2d(8, 12, 2, 2, groups=2, bias=False)])
@pytest.mark.parametrize('affine', [True, False])
def test_folded_kinds(conv, affine):
    model = double(Toy(lambda net, x: net.norm(net.conv(net.stem(x))), stem=nn.Conv2d(3, 8, 1),
                       conv=copy.deepcopy(conv), norm=nn.BatchNorm2d(12, affine=affine)))
    model.norm.running_mean.uniform_(-1, 1)
    before = outputs(model)
    assert fold_norms(model) == ['norm']
    assert isinstance(model.norm, nn.Identity)
    assert difference(outputs(model), before) < 1e-12


def shared(net, x):
    """A convolution that two levels share, with a BatchNorm for each, and one that they share."""
    first, second = net.stem(x), net.down(x)
    levels = [net.norm_a(net.conv(first)), net.norm_b(net.conv(second))]
    return [net.both_norm(net.both(level)) for level in levels]


def test_shared_convolution_with_a_norm_for_each_level():
    model = double(Toy(
        shared, stem=nn.Conv2d(3, 4, 1), down=nn.Conv2d(3, 4, 2, 2), conv=nn.Conv2d(4, 4, 1),
        norm_a=nn.BatchNorm2d(4), norm_b=nn.BatchNorm2d(4), both=nn.Conv2d(4, 5, 1),
        both_norm=nn.BatchNorm2d(5)))
    before = outputs(model)
    assert fold_norms(model) == ['both_norm']
    assert norms_of(model) == ['norm_a', 'norm_b']
    assert difference(outputs(model), before) < 1e-12


@pytest.mark.parametrize('run', [
    lambda net, x: net.norm(net.conv(x).relu()),  # not what the convolution emits
    lambda net, x: net.norm(net.conv(x)) + net.conv(-x),  # not all of it
    lambda net, x: net.norm(net.conv(x)) + net.norm(net.other(x)),  # of two convolutions
    lambda net, x: net.norm(net.conv(x)) + net.norm(torch.cat((x, x[:, :1]), 1)),  # of more
])
def test_left_alone(run):
    model = double(Toy(run, conv=nn.Conv2d(3, 4, 1), other=nn.Conv2d(3, 4, 1),
                       norm=nn.BatchNorm2d(4)))
    before = outputs(model)
    assert fold_norms(model) == [] and norms_of(model) == ['norm']
    assert difference(outputs(model), before) == 0


def test_output_that_something_else_reads():
    def run(net, x):
        x = net.conv(x)
        return net.norm(x) + x

    model = double(Toy(run, conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4)))
    before = outputs(model)
    with pytest.raises(UserError, match='something else reads what a convolution emits'):
        fused(model)
    assert difference(outputs(model), before) == 0


def test_norm_without_statistics_stays():
    model = Toy(lambda net, x: net.norm(net.conv(x)), conv=nn.Conv2d(3, 4, 1),
                norm=nn.BatchNorm2d(4, track_running_stats=False))
    assert fold_norms(model) == []


def test_copy():
    model = double(Toy(lambda net, x: net.pred(net.stem(x)), stem=Block(3, 6),
                       pred=nn.Conv2d(6, 2, 1))).train()
    copied = fused(model)
    assert model.training and norms_of(model) == ['stem.bn']
    assert not copied.training and norms_of(copied) == []
    assert difference(outputs(copied), outputs(model)) < 1e-12


def test_convolution_of_several_names():
    """Each level gets its own, into which its BatchNorm is folded."""
    model = double(Toy(
        lambda net, x: [net.a(x), net.b(x)], a=Block(3, 4, act=nn.Identity),
        b=Block(3, 4, act=nn.Identity)))
    model.b.conv = model.a.conv
    copied = fused(model)
    assert norms_of(copied) == [] and model.b.conv is model.a.conv
    assert difference(outputs(copied), outputs(model)) < 1e-12


@pytest.mark.parametrize('name, ratio', [
    ('yolov6-n', 0.4), ('rtmdet-tiny', 0.4),
    *(pytest.param(name, ratio, marks=pytest.mark.slow) for name, ratio in (
        ('yolov6-n', 0), ('rtmdet-tiny', 0), ('ppyoloe-plus-s', 0), ('ppyoloe-plus-s', 0.4)))])
def test_families(name, ratio):
    """RepVGG blocks become convolutions, and no BatchNorm is left."""
    model = narrow_detector(narrow_config(name), ratio).double()
    copied = fused(model)
    assert norms_of(copied) == [] and len(norms_of(model)) > 40
    assert any(hasattr(block, 'rbr_reparam') for block in copied.modules()) == (
        name != 'rtmdet-tiny')
    assert not any('rbr_dense' in key for key, _ in copied.named_modules())
    assert difference(outputs(copied), outputs(model)) < 1e-9


def test_mmcv_folds_shared_convolutions_wrongly():
    """What the documentation warns of; if this fails, the warning has to go."""
    model = narrow_detector(narrow_config('rtmdet-tiny')).double()
    assert difference(outputs(fuse_conv_bn(copy.deepcopy(model))), outputs(model)) > 0.1

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Fits of single layers, against NumPy's solver on patches that PyTorch unfolds."""
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvWS2d

from mmgcp.nn.sampling import Places, as_maps
from mmgcp.pruning.compensation import layer_fits
from mmgcp.pruning.compensation.layer_fits import KernelFit, MeanFit, MixingFit, make_fit

PADDED = dict(zeros='constant')


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def every_place(maps):
    """All places of feature maps (N, H, W, C)."""
    return Places(*(grid.flatten() for grid in torch.meshgrid(
        *(torch.arange(size) for size in maps.shape[:3]), indexing='ij')))


def make_case(layer, removed, shape, kept_outputs=None):
    """A layer, its original, inputs of the original and of the changed, and kept channels."""
    original = copy.deepcopy(layer.double())
    dim = -1 if isinstance(layer, nn.Linear) else 1
    x = random_tensor(*shape) + 0.5
    mixed = x + x.roll(1, dim)  # so that the inputs tell of each other
    z = mixed + 0.3 * random_tensor(*shape, seed=1)
    z = z.index_fill(dim, torch.tensor(removed).long(), 0)
    kept = {'in': torch.ones(shape[dim], dtype=torch.bool)}
    kept['in'][removed] = False
    outputs = layer(x).shape[dim]
    kept['out'] = kept_outputs if kept_outputs is not None else torch.arange(outputs) % 3 != 1
    return original, mixed, z, kept


@torch.no_grad()
def fit(layer, original, x, z, kept, ridge=0., keys=('bias', )):
    """Fit a layer to all places of so many portions of the inputs."""
    found = None
    for key, old, new in zip(keys, x.chunk(len(keys)), z.chunk(len(keys))):
        output = original(old)
        if found is None:
            found = make_fit(layer, original, kept, ridge, old, output)
        found.add(new, *found.targets(old, output, every_place), key)
    return found, found.apply()


def padded(layer, inputs):
    mode = PADDED.get(layer.padding_mode, layer.padding_mode)
    return F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)


def patches_of(layer, inputs):
    """Patches (S, I, T) of a convolution, or inputs (S, I, 1) of a linear layer."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1], 1)
    unfolded = F.unfold(padded(layer, inputs), layer.kernel_size, layer.dilation, 0, layer.stride)
    return unfolded.transpose(1, 2).flatten(0, 1).unflatten(1, (inputs.shape[1], -1))


def least_squares(z, y, prior, ridge):
    """The matrix (O, I) and the offset (O, ) of NumPy, with a row of the ridge for each input."""
    z, y, prior = (value.detach().numpy() for value in (z, y, prior))
    strength = np.sqrt(ridge * np.square(z - z.mean(0)).mean())
    rows = np.block([[z, np.ones((len(z), 1))],
                     [strength * np.eye(z.shape[1]), np.zeros((z.shape[1], 1))]])
    solution = np.linalg.lstsq(rows, np.concatenate((y, strength * prior.T)), rcond=None)[0]
    return solution[:-1].T, solution[-1]


LAYERS = {
    'pointwise': lambda: (nn.Conv2d(6, 4, 1, bias=False), (3, 6, 5, 5)),
    'spatial': lambda: (nn.Conv2d(6, 4, 3, padding=1), (4, 6, 7, 6)),
    'strided': lambda: (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (5, 6, 7, 8)),
    'dilated': lambda: (nn.Conv2d(6, 4, 3, dilation=2, padding='same'), (4, 6, 7, 7)),
    'same': lambda: (nn.Conv2d(6, 4, (2, 3), padding='same'), (4, 6, 7, 7)),
    **{mode: lambda mode=mode: (nn.Conv2d(6, 4, 3, padding=1, padding_mode=mode), (4, 6, 6, 7))
       for mode in ('reflect', 'replicate', 'circular')},
    'linear': lambda: (nn.Linear(6, 4), (30, 6)),
    'tokens': lambda: (nn.Linear(6, 4, bias=False), (4, 9, 6)),
}


@pytest.mark.parametrize('ridge', [0, 30])
@pytest.mark.parametrize('name', LAYERS)
def test_kernels(name, ridge):
    layer, shape = LAYERS[name]()
    original, x, z, kept = make_case(layer, [1, 4], shape)
    found, offsets = fit(layer, original, x, z, kept, ridge)
    assert isinstance(found, KernelFit) and found.kind == 'kernel'
    ins, outs = (kept[side].nonzero().flatten() for side in ('in', 'out'))
    targets = as_maps(layer, original(x)).flatten(0, 2)
    if original.bias is not None:
        targets = targets - original.bias
    prior = original.weight.flatten(2) if layer.weight.dim() > 2 else original.weight[..., None]
    matrix, offset = least_squares(patches_of(layer, z)[:, ins].flatten(1), targets[:, outs],
                                   prior[outs][:, ins].flatten(1), ridge)
    fitted = layer.weight.detach().view_as(prior)[outs][:, ins].flatten(1)
    assert np.allclose(fitted, matrix, atol=1e-8)
    assert np.allclose(offsets['bias'][outs], offset, atol=1e-8)
    # All else is as it was
    assert not offsets['bias'][~kept['out']].any()
    changed = (layer.weight != original.weight).view_as(prior)
    assert not changed[~kept['out']].any() and not changed[:, ~kept['in']].any()
    assert not np.allclose(fitted, prior[outs][:, ins].flatten(1).detach(), atol=0.01)


@pytest.mark.parametrize('multiplier', [1, 2])
def test_groups(multiplier):
    """Each group of a convolution is a convolution of its own."""
    layer = nn.Conv2d(9, 6 * multiplier, 3, groups=3, padding=1)
    original, x, z, kept = make_case(layer, [1, 3, 8], (6, 9, 6, 6),
                                     torch.arange(6 * multiplier) % (2 * multiplier) > 0)
    fit(layer, original, x, z, kept, 10)
    for group in range(3):
        alone = nn.Conv2d(3, 2 * multiplier, 3, padding=1).double()
        ins = slice(3 * group, 3 * group + 3)
        outs = slice(2 * multiplier * group, 2 * multiplier * (group + 1))
        alone.weight.data.copy_(original.weight[outs])
        alone.bias.data.copy_(original.bias[outs])
        fit(alone, copy.deepcopy(alone), x[:, ins], z[:, ins],
            dict(zip(('in', 'out'), (kept['in'][ins], kept['out'][outs]))), 10)
        assert torch.allclose(alone.weight, layer.weight[outs], atol=1e-8)


def test_depthwise():
    layer = nn.Conv2d(5, 5, 3, groups=5)
    kept = torch.tensor([True, False, True, True, False])
    original, x, z, _ = make_case(layer, [1, 4], (4, 5, 6, 6))
    _, offsets = fit(layer, original, x, z, {'in': kept, 'out': kept}, 10)
    patches, targets = patches_of(layer, z), as_maps(layer, original(x)).flatten(0, 2)
    for channel in range(5):
        matrix, offset = least_squares(
            patches[:, channel], targets[:, [channel]] - original.bias[channel],
            original.weight[channel].flatten(1), 10)
        if kept[channel]:
            assert np.allclose(layer.weight[channel].detach().flatten(1), matrix, atol=1e-8)
            assert np.allclose(offsets['bias'][channel], offset, atol=1e-8)
        else:
            assert torch.equal(layer.weight[channel], original.weight[channel])
            assert offsets['bias'][channel] == 0


MIXED = {
    'transposed': lambda: (nn.ConvTranspose2d(6, 4, 2, 2), [1, 4], (4, 6, 5, 5)),
    'overlapping': lambda: (nn.ConvTranspose2d(6, 4, 3, 2, bias=False), [1, 4], (4, 6, 5, 5)),
    'transposed groups': lambda: (nn.ConvTranspose2d(6, 4, 2, 2, groups=2), [1, 4], (4, 6, 5, 5)),
    'large': lambda: (nn.Conv2d(6, 4, 3, padding=1), [1, 4], (4, 6, 5, 5)),
    'large groups': lambda: (nn.Conv2d(6, 4, 3, groups=2), [1, 4], (4, 6, 6, 6)),
}


@pytest.mark.parametrize('ridge', [0, 30])
@pytest.mark.parametrize('name', MIXED)
def test_mixtures(name, ridge, monkeypatch):
    monkeypatch.setattr(layer_fits, 'MAX_UNKNOWNS', 6)
    layer, removed, shape = MIXED[name]()
    original, x, z, kept = make_case(layer, removed, shape,
                                     torch.arange(4) % 2 == 0)
    found, offsets = fit(layer, original, x, z, kept, ridge)
    assert isinstance(found, MixingFit) and found.kind == 'mixture of inputs'
    # The original on the estimated inputs: mixtures of new ones, and a constant
    width = 6 // layer.groups
    estimate = torch.zeros_like(x)
    constants = torch.zeros(6, dtype=torch.double)
    for first in range(0, 6, width):
        channels = torch.arange(first, first + width)
        ins = channels[kept['in'][channels]]
        flat = (maps.permute(0, 2, 3, 1).flatten(0, 2) for maps in (z[:, ins], x[:, channels]))
        matrix, constant = least_squares(*flat, torch.eye(6).double()[channels][:, ins], ridge)
        estimate[:, channels] = torch.einsum(
            'ck,nkhw->nchw', torch.from_numpy(matrix), z[:, ins])
        constants[channels] = torch.from_numpy(constant)
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    assert torch.allclose(layer(z) - bias, original(estimate) - bias, atol=1e-8)
    # Far from the border, and on average over the phases of a stride
    large = constants[:, None, None].expand(1, -1, 28, 28)
    inner = (original(large) - bias)[..., 4:20, 4:20].mean((0, 2, 3))
    assert torch.allclose(offsets['bias'], inner, atol=1e-8)


def test_separate_offsets():
    """Runs before different BatchNorms share the kernel, but not the offset."""
    layer = nn.Conv2d(6, 4, 1, bias=False)
    original, x, z, kept = make_case(layer, [1, 4], (4, 6, 5, 5))
    x[2:] += torch.arange(6.)[:, None, None]
    _, offsets = fit(layer, original, x, z, kept, keys=(('one', ), ('two', )))
    outs = kept['out'].nonzero().flatten()
    lacking = (original(x) - layer(z))[:, outs].unflatten(0, (2, 2)).mean((1, 3, 4))
    assert torch.allclose(torch.stack((offsets['one', ], offsets['two', ]))[:, outs], lacking)
    assert not torch.allclose(*lacking, atol=0.1)


def test_without_offset():
    layer = nn.Conv2d(6, 4, 1, bias=False)
    original, x, z, kept = make_case(layer, [1, 4], (4, 6, 5, 5))
    _, offsets = fit(layer, original, x, z, kept, keys=(None, ))
    ins, outs = (kept[side].nonzero().flatten() for side in ('in', 'out'))
    inputs, targets = (maps.detach().permute(0, 2, 3, 1).flatten(0, 2)
                       for maps in (z[:, ins], original(x)[:, outs]))
    matrix = np.linalg.lstsq(inputs.numpy(), targets.numpy(), rcond=None)[0].T
    assert np.allclose(layer.weight[outs][:, ins, 0, 0].detach(), matrix, atol=1e-8)
    assert offsets == {}


OTHERS = {
    'pads by itself': lambda: Conv2dAdaptivePadding(6, 4, 3, stride=2, padding=1),
    'standardises its weight': lambda: ConvWS2d(6, 4, 3),
}


@pytest.mark.parametrize('name', OTHERS)
def test_layers_that_compute_something_else(name):
    """Of a class with a forward of its own only the mean is made up for."""
    layer = OTHERS[name]()
    original, x, z, kept = make_case(layer, [1, 4], (4, 6, 7, 7))
    found, offsets = fit(layer, original, x, z, kept, keys=('bias', 'bias'))
    assert isinstance(found, MeanFit) and found.kind == 'mean'
    assert torch.equal(layer.weight, original.weight)
    lacking = (original(x) - layer(z)).mean((0, 2, 3))
    assert torch.allclose(offsets['bias'], lacking * kept['out'], atol=1e-8)


def test_mean_of_a_layer_with_an_adapted_bias(monkeypatch):
    monkeypatch.setattr(layer_fits, 'MAX_UNKNOWNS', 2)
    layer = nn.Linear(6, 4)
    original, x, z, kept = make_case(layer, [1, 4], (50, 6))
    with torch.no_grad():
        layer.bias += 3
    found, offsets = fit(layer, original, x, z, kept)
    assert isinstance(found, MeanFit)
    lacking = (F.linear(x, original.weight) - F.linear(z, layer.weight)).mean(0)
    assert torch.allclose(offsets['bias'], lacking * kept['out'], atol=1e-8)


def test_adapted_weights_are_no_mixture(monkeypatch):
    """What a layer-wise criterion has made of them is kept."""
    monkeypatch.setattr(layer_fits, 'MAX_UNKNOWNS', 6)
    layer = nn.Conv2d(6, 4, 3)
    original, x, z, kept = make_case(layer, [1], (4, 6, 5, 5))
    with torch.no_grad():
        layer.weight *= 1.1
    assert isinstance(fit(layer, original, x, z, kept)[0], MeanFit)


def test_subclasses_that_compute_the_same():
    class Checked(nn.Conv2d):
        def forward(self, x):
            assert x.dim() == 4
            return super().forward(x)

    layer = Checked(6, 4, 3, padding=1)
    assert isinstance(fit(layer, *make_case(layer, [1], (4, 6, 5, 5)))[0], KernelFit)


@pytest.mark.parametrize('channels_last', [False, True])
def test_nothing_removed(channels_last):
    """The weights stay what they are where the inputs are the same."""
    layer = nn.Conv2d(6, 4, 3, padding=1)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    original, x, _, kept = make_case(layer, [], (4, 6, 5, 5), torch.ones(4, dtype=torch.bool))
    _, offsets = fit(layer, original, x, x, kept, 1)
    assert torch.allclose(layer.weight, original.weight, rtol=0, atol=1e-10)
    assert torch.allclose(offsets['bias'], torch.zeros(4).double(), atol=1e-10)

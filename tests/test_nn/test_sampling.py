# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Places in feature maps, and what layers read there."""
import pytest
import torch
import torch.nn as nn

from mmgcp.nn.sampling import as_maps, draw_places, read_patches


def make_input(*shape):
    return torch.randn(*shape, dtype=torch.double, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('options', [
    dict(kernel_size=1), dict(kernel_size=3, padding=1), dict(kernel_size=3, stride=2),
    dict(kernel_size=(3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    dict(kernel_size=(4, 3), padding='same'), dict(kernel_size=3, padding='valid', dilation=2),
    *(dict(kernel_size=(3, 5), padding=(1, 2), padding_mode=mode)
      for mode in ('reflect', 'replicate', 'circular'))])
def test_patches_times_kernel_are_the_output(options):
    layer = nn.Conv2d(4, 5, bias=False, **options).double()
    inputs = make_input(3, 4, 8, 11)
    output = as_maps(layer, layer(inputs))
    places = draw_places(output, range(3), 1000)
    assert len(places.row) == output[..., 0].numel()
    patches = read_patches(layer, as_maps(layer, inputs), places)
    assert torch.allclose(torch.einsum('stc,oct->so', patches, layer.weight.flatten(2)),
                          output[places])


def test_patches_of_linear_layers():
    layer = nn.Linear(4, 2).double()
    inputs = make_input(3, 5, 4)
    places = draw_places(as_maps(layer, inputs), range(3), 2)
    patches = read_patches(layer, as_maps(layer, inputs), places)
    assert patches.shape == (6, 1, 4)
    assert torch.equal(patches[:, 0], inputs[places.image, places.column])
    assert as_maps(layer, inputs[:, 0]).shape == (3, 1, 1, 4)


def test_inputs_are_not_changed():
    layer = nn.Conv2d(2, 2, 3, padding=1)
    maps = torch.ones(1, 4, 4, 2)
    read_patches(layer, maps, draw_places(maps, [0], 16))
    assert (maps == 1).all()


def test_places_are_those_of_the_image():
    """They do not depend on the images that are run with it, and differ from image to image."""
    maps = torch.zeros(3, 10, 10, 1)
    together = draw_places(maps, [4, 5, 6], 7)
    assert torch.equal(together.image, torch.arange(3).repeat_interleave(7))
    for index in range(3):
        alone = draw_places(maps[:1], [4 + index], 7)
        chosen = together.image == index
        assert torch.equal(alone.row, together.row[chosen])
        assert torch.equal(alone.column, together.column[chosen])
    inside = (together.row * 10 + together.column).view(3, 7)
    assert all(len(set(places)) == 7 for places in inside.tolist())
    assert not torch.equal(inside[0], inside[1])


def test_several_maps_of_an_image():
    """As of regions of interest: those of an image come one after the other."""
    maps = torch.zeros(6, 10, 10, 1)
    places = draw_places(maps, [4, 5], 1)
    inside = places.row * 10 + places.column
    second = draw_places(maps[:3], [5], 1)
    assert torch.equal(inside[3:], second.row * 10 + second.column)
    assert len(set(inside.tolist())) > 3

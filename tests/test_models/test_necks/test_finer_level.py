# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmyolo.models.necks import YOLOv5PAFPN
from pruning_samples import randomise

from mmgcp.errors import UserError
from mmgcp.models import YOLOv4PAFPN
from mmgcp.models.necks import YOLOv4FinerPAFPN, YOLOv5FinerPAFPN

FACTORS = dict(deepen_factor=0.33, widen_factor=0.25)
IN, OUT = dict(v4=[128, 256, 512, 1024], v5=[64, 128, 256, 512]), dict(
    v4=[64, 128, 256, 512], v5=[64, 128, 256, 512])
KINDS = dict(v4=(YOLOv4FinerPAFPN, YOLOv4PAFPN), v5=(YOLOv5FinerPAFPN, YOLOv5PAFPN))


@pytest.fixture(params=['v4', 'v5'])
def name(request):
    return request.param


def test_levels(name):
    """The coarser ones are those of the ordinary neck, with its weights under their names."""
    kind, plain_kind = KINDS[name]
    neck = randomise(kind(IN[name], OUT[name], **FACTORS))
    plain = plain_kind(in_channels=IN[name][1:], out_channels=OUT[name][1:], **FACTORS)
    neck.eval()
    plain.eval()
    state = {key: value for key, value in neck.state_dict().items()
             if not key.startswith('finer.')}
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    maps = [torch.rand(2, channels // 4, 64 // 2**level, 32 // 2**level)
            for level, channels in enumerate(IN[name])]
    outputs, expected = neck(maps), plain(maps[1:])
    assert [tuple(output.shape) for output in outputs] == [
        (2, channels // 4, 64 // 2**level, 32 // 2**level)
        for level, channels in enumerate(OUT[name])]
    assert all(torch.equal(a, b) for a, b in zip(outputs[1:], expected))
    changed = neck([maps[0] + 1, *maps[1:]])
    assert not torch.allclose(changed[0], outputs[0])
    assert all(torch.equal(a, b) for a, b in zip(changed[1:], outputs[1:]))


def test_frozen(name):
    neck = KINDS[name][0](IN[name], OUT[name], freeze_all=True, **FACTORS)
    neck.train()
    assert not any(parameter.requires_grad for parameter in neck.parameters())
    assert not neck.finer.reduce.bn.training


def test_initialised_like_the_neck(name):
    neck = KINDS[name][0](IN[name], OUT[name], **FACTORS)
    neck.init_weights()
    weight = neck.finer.lateral.conv.weight
    assert 0.8 < float(weight.abs().max()) * weight.shape[1]**0.5 <= 1  # PyTorch's bound


@pytest.mark.parametrize('channels', [[8, 16], [8, 16, 32, 64]])
def test_wrong_numbers_of_levels(name, channels):
    with pytest.raises(UserError, match='at least three levels'):
        KINDS[name][0](channels, channels[:2] if len(channels) > 2 else channels)

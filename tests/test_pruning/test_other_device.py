# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning on another device than the CPU: the same plan and weights, and no tensor on both."""
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from auxiliary_toys import SIZE, make_batches, tiny_detector
from layer_kinds import KINDS, make_kind
from mmengine.utils import digit_version
from second_device import DEVICE, DeviceTensor, SecondDevice
from tiers import slow_except

from mmgcp.attention import InsertedAttention, attention_aside
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning import prune

# The second device computes on the CPU, but refuses what a GPU refuses
DEVICES = [
    pytest.param((SecondDevice, DEVICE, 0.), id='second', marks=pytest.mark.skipif(
        digit_version(torch.__version__) < digit_version('2.1'), reason='torch is too old')),
    pytest.param((nullcontext, torch.device('cuda'), 1e-6), id='cuda', marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason='there is no GPU'))
]
NO_SETTINGS = {}
CRITERIA = dict(
    BNScale=NO_SETTINGS, L1Norm=dict(fold_norm=True), L2Norm=NO_SETTINGS, FPGM=NO_SETTINGS,
    Random=NO_SETTINGS, APoZ=NO_SETTINGS, Taylor=NO_SETTINGS, GroupFisher=NO_SETTINGS,
    CPSCA=NO_SETTINGS, ThiNet=dict(positions=20), DCP=dict(rounds=2, epochs=1, aux_epochs=1),
    LCP=dict(rounds=2, epochs=1, aux_epochs=1))


def crop(feature, rois, size, *_):
    """In place of MMCV's function, which knows only the CPU and GPUs."""
    return F.adaptive_avg_pool2d(feature[rois[:, 0].long()], size) + rois[:, 1:].mean()


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    monkeypatch.setattr('mmgcp.pruning.layerwise.lcp.roi_align', crop)
    return request.param


def batches_on(device):
    return [Batch(batch.images.double().to(device), dict(
        batch.data_samples, bboxes_labels=batch.data_samples['bboxes_labels'].to(device)))
        for batch in make_batches(2, size=2 * SIZE)]


def pruned(model, device, context, **options):
    """The removed channels, and all tensors of the pruned model on the CPU."""
    with context():
        model.double().to(device)
        batches = batches_on(device)
        with attention_aside(model):
            result = prune(model, ratio=0.4, input_shape=(3, SIZE, SIZE), batches=batches,
                           calibration=[batch.images for batch in batches], **options)
        state = model.state_dict()
        assert all(value.device.type == device.type for value in state.values())
        return ({item.name: item.removed for item in result.plan.units},
                {name: value.cpu() for name, value in state.items()})


def assert_same(make, device, **options):
    context, device, tolerance = device
    removed, state = pruned(make(), torch.device('cpu'), nullcontext, **options)
    found_removed, found = pruned(make(), device, context, **options)
    assert found_removed == removed and found.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)
    return removed


def detector(with_attention=False):
    model, _ = tiny_detector()
    if with_attention:
        torch.manual_seed(0)
        InsertedAttention({'stem': 'stem.conv', 'body': 'body.conv'}, dict(stem=6, body=8),
                          num_groups=2).insert(model)
        for param in model.sca.parameters():
            torch.nn.init.normal_(param)
    return model


@pytest.mark.parametrize('compensate', slow_except([True], [True, 'fold-means', False]))
@pytest.mark.parametrize('name', CRITERIA)
def test_criteria(name, compensate, device):
    removed = assert_same(lambda: detector(name == 'CPSCA'), device, compensate=compensate,
                          criterion=dict(type=f'mmgcp.{name}', **CRITERIA[name]))
    assert sum(map(len, removed.values())) > 2


@pytest.mark.parametrize('name', ['BNScale', 'ThiNet'])
@pytest.mark.parametrize('kind', KINDS)
def test_kinds_of_layers(kind, name, device):
    assert_same(lambda: make_kind(kind).eval(), device, criterion=dict(type=f'mmgcp.{name}'))


def test_constants_without_images(device):
    context, target, tolerance = device
    states = []
    for place, inside in (('cpu', nullcontext), (target, context)):
        with inside():
            model = detector().to(place)
            prune(model, ratio=0.4, input_shape=(3, SIZE, SIZE))
            states.append({name: value.cpu() for name, value in model.state_dict().items()})
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=tolerance)


def test_sensitivity(device):
    def evaluate(model):
        like = next(model.parameters())
        return 1 / float(model(torch.ones(1, 3, SIZE, SIZE).to(like)).square().mean())

    assert_same(detector, device, evaluate=evaluate)


@pytest.mark.skipif(digit_version(torch.__version__) < digit_version('2.1'),
                    reason='torch is too old')
def test_second_device_refuses_to_mix():
    """The tests above can fail."""
    with SecondDevice():
        ours, others = torch.arange(3.).to(DEVICE), torch.arange(3.)
        assert isinstance(ours, DeviceTensor) and ours.device == DEVICE
        for function in (lambda: ours + others, lambda: others.add_(ours),
                         lambda: torch.where(ours > 1, others, others),
                         lambda: others[ours.long()], lambda: torch.cat((ours, others)),
                         lambda: others.index_fill(0, ours.long(), 0),
                         lambda: ours.index_add(0, others.long(), ours), lambda: ours.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                function()
        # as a GPU does
        ours[others.long()[:2]] = 5.
        others.copy_(ours)
        assert others.tolist() == ours.tolist() == [5., 5., 2.]
        assert float(ours.sum() + torch.tensor(1.)) == 13


@pytest.mark.parametrize('name', ['BNScale', 'APoZ', 'ThiNet'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_half_precision(name, dtype):
    """What is measured in half precision is nearly what is measured otherwise."""
    model = detector().to(dtype)
    batches = [Batch(batch.images.to(dtype), batch.data_samples) for batch in make_batches(2)]
    expected = detector()
    for module, place in ((model, batches), (expected, make_batches(2))):
        with torch.autocast('cpu', torch.bfloat16):
            prune(module, ratio=0.3, input_shape=(3, SIZE, SIZE), batches=place,
                  calibration=[batch.images for batch in place],
                  criterion=dict(type=f'mmgcp.{name}'))
    for key, value in expected.state_dict().items():
        found = model.state_dict()[key]
        assert found.dtype == (dtype if value.is_floating_point() else value.dtype)
        torch.testing.assert_close(
            found.to(value), value, rtol=0.1 if dtype == torch.bfloat16 else 0,
            atol=0.1 if dtype == torch.bfloat16 else 0)

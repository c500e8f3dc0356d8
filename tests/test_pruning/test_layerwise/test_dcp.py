# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn.functional as F
from auxiliary_toys import begun, make_batches, mmdet_samples, tiny_detector, total_loss
from yolov4_samples import build, yolov4

from mmgcp.pruning import prune
from mmgcp.pruning.layerwise import DCP
from mmgcp.pruning.surgery import channels_off
from mmgcp.registry import TASK_UTILS


def test_options():
    assert TASK_UTILS.build(dict(type='mmgcp.DCP')).settings.rounds == 4
    criterion = TASK_UTILS.build(
        dict(type='mmgcp.DCP', alpha=0.3, allocation_criterion=dict(type='x')))
    assert criterion.settings.alpha == 0.3 and criterion.allocation_criterion == dict(type='x')
    assert criterion.needs == 'losses'


def test_score_by_hand():
    """Half the mean squared error and the binary cross-entropies, without any channel."""
    model, units = tiny_detector()
    batches = make_batches(samples=mmdet_samples)
    criterion = begun(DCP(rounds=1, alpha=0.4, aux_epochs=1, joint_lr=0), model, units.values(),
                      batches)
    network = criterion.auxiliaries['stem.conv'].network
    presence, total = torch.tensor([[0., 1., 0.], [1., 0., 1.]]), torch.zeros(8, 6, 3, 3)
    for batch in batches:
        with torch.no_grad():
            inputs = model.stem(batch.images)
            original = model.body.conv(inputs)
        weight = torch.zeros(8, 6, 3, 3, requires_grad=True)
        output = F.conv2d(inputs, weight, padding=1)
        scores = network.classifier(F.relu(network.bn(output)).mean((2, 3)))
        loss = 0.5 * F.mse_loss(output, original) + 0.4 * F.binary_cross_entropy_with_logits(
            scores, presence)
        total += torch.autograd.grad(loss, weight)[0] / 2
    found = criterion.score(model, units['stem.conv'], batches)
    assert torch.allclose(found, total.square().sum((0, 2, 3)).double(), rtol=1e-4)


def test_rounds_take_equal_shares():
    model, units = tiny_detector()
    batches = make_batches()
    criterion = begun(DCP(aux_epochs=1), model, units.values(), batches)
    scores = criterion.score(model, units['body.conv'], batches)
    assert scores.floor().long().bincount().tolist() == [2, 2, 2, 2]
    assert (scores % 1).max() <= 0.5


def test_more_rounds_than_channels():
    model, units = tiny_detector()
    batches = make_batches()
    criterion = begun(DCP(rounds=10, aux_epochs=1), model, units.values(), batches)
    scores = criterion.score(model, units['stem.conv'], batches)
    assert sorted(scores.floor().tolist()) == [4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize('lr', [1e-2, 1e-3])
def test_update_lowers_the_loss(lr):
    model, units = tiny_detector()
    batches, unit = make_batches(), units['body.conv']
    criterion = begun(DCP(aux_epochs=1, epochs=5, lr=lr), model, units.values(), batches)
    removed = torch.tensor([1, 2, 6])
    with channels_off(model, [unit], {'body.conv': removed}):
        start = total_loss(criterion, model, unit, batches)
        criterion.update(model, unit, removed, batches)
        assert total_loss(criterion, model, unit, batches) < start


def test_detector():
    model = build(yolov4())
    result = prune(
        model, groups=[dict(name='some', modules=['backbone.stage2.0'], ratio=0.5)],
        batches=make_batches(1, size=64), input_shape=(3, 64, 64),
        criterion=dict(type='mmgcp.DCP', aux_epochs=1, epochs=1, rounds=2))
    assert [len(channels) for channels in result.plan.removed().values()] == [8]
    assert model.backbone.stage2[0].conv.out_channels == 8

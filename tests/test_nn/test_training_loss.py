# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
from families import family_config
from loss_toys import assert_as_before, make_batches, make_toy, snapshot
from mmcv.cnn.bricks import DropPath
from mmdet.models.layers import DropBlock
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from yolov4_samples import batch

from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode, seed_batch
from mmgcp.utils.config import build_detector


@pytest.fixture
def hub():
    hub = MessageHub.get_current_instance()
    epoch = hub.get_info('epoch')
    yield hub
    if epoch is None:
        hub.pop_info('epoch')
    else:
        hub.update_info('epoch', epoch)


def test_loss_of_yolov4(model):
    """It is that of training, but for the normalisation, and repeats itself."""
    data = model.data_preprocessor(batch(), True)
    data = Batch(data['inputs'], data['data_samples'])
    before = snapshot(model)
    with loss_mode(model):
        first, second = detection_loss(model, data), detection_loss(model, data)
    assert_as_before(model, before)
    assert first.dim() == 0 and first.requires_grad and torch.equal(first, second)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses = model.loss(data.images, data.data_samples)
    assert float(first) == pytest.approx(float(sum(losses.values())), rel=1e-6)


@pytest.mark.parametrize('family', ['yolov5-n', 'yolov8-n', 'ssd300'])
def test_batches_stay_as_they_are(family):
    """Though YOLOv5's head changes the boxes that it gets in place."""
    cfg = family_config(family)
    model, size = build_detector(cfg), 300 if family == 'ssd300' else 64
    model.eval()
    images = torch.rand(2, 3, size, size)
    if family == 'ssd300':
        model.neck.l2_norm.weight.data.fill_(20.)  # which is not initialised
        sample = DetDataSample(gt_instances=InstanceData(
            bboxes=torch.tensor([[10., 20., 90., 80.]]), labels=torch.tensor([1])))
        sample.set_metainfo(dict.fromkeys(
            ('img_shape', 'batch_input_shape', 'pad_shape'), (size, size)))
        samples = [sample, copy.deepcopy(sample)]
    else:
        samples = dict(bboxes_labels=torch.tensor([[0., 1., 4., 4., 40., 40.]]),
                       img_metas=[dict(batch_input_shape=(size, size))] * 2)
    data = Batch(images, copy.deepcopy(samples))
    with loss_mode(model):
        losses = [float(detection_loss(model, data)) for _ in range(2)]
    assert losses[0] == losses[1]
    if family == 'ssd300':
        found = [item.gt_instances.bboxes for item in data.data_samples]
        assert all(torch.equal(boxes, sample.gt_instances.bboxes) for boxes in found)
    else:
        assert torch.equal(data.data_samples['bboxes_labels'], samples['bboxes_labels'])


def test_loss_of_a_toy():
    model, _ = make_toy('chain')
    item, = make_batches(3)
    with loss_mode(model):
        loss = detection_loss(model, item)
    errors = model(item.images) - item.data_samples['targets'][:, None, None, None]
    assert float(loss) == pytest.approx(float(errors.square().mean((1, 2, 3)).sum()))


class Moody(nn.Module):
    """Much of what may differ from one loss to the next."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.drops = nn.ModuleList([nn.Dropout(0.5), nn.Dropout2d(0.5), DropPath(0.5),
                                    DropBlock(0.5, 3)])
        self.register_buffer('calls', torch.zeros(()))
        self.seen = None

    def forward(self, x):
        self.calls += 1
        self.seen = (self.training, torch.is_grad_enabled(), random.random(), np.random.rand(),
                     float(torch.rand(())))
        x = self.bn(x)
        for drop in self.drops:
            x = drop(x)
        return x


def test_nothing_is_left_to_chance_nor_leaves_traces():
    model = Moody().train()
    model.drops[0].eval()
    before = snapshot(model)
    x = torch.randn(2, 4, 8, 8)
    outputs, seen = [], []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        with torch.no_grad(), loss_mode(model):
            outputs.append(model(x))
            seen.append(model.seen)
            assert float(model.calls) == 1
        assert states[0] == random.getstate()
        assert states[1] == np.random.get_state()[1].tolist()
        assert torch.equal(states[2], torch.get_rng_state())
        assert_as_before(model, before)
    assert torch.equal(*outputs) and outputs[0].requires_grad
    assert torch.allclose(outputs[0], x, atol=1e-4)  # nothing dropped, statistics of 0 and 1
    assert seen[0] == seen[1] and seen[0][:2] == (True, True)


def test_random_numbers_differ_within_a_run():
    model = Moody()
    with loss_mode(model):
        seen = [model(torch.zeros(1, 4, 2, 2)) is not None and model.seen for _ in range(2)]
    assert seen[0][2:] != seen[1][2:]


@pytest.mark.parametrize('epoch', [None, 3])
def test_epoch(hub, epoch):
    """Detectors that begin with another assigner are past that."""
    hub.pop_info('epoch')
    if epoch is not None:
        hub.update_info('epoch', epoch)
    with loss_mode(Moody()):
        assert hub.get_info('epoch') > 1000
    assert hub.get_info('epoch') == epoch
    assert ('epoch' in hub.runtime_info) == (epoch is not None)


def test_all_is_restored_after_an_error(hub):
    hub.update_info('epoch', 5)
    model = Moody().eval()
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(ValueError), torch.no_grad(), loss_mode(model):
        model(torch.zeros(1, 4, 2, 2))
        raise ValueError
    assert_as_before(model, before)
    assert hub.get_info('epoch') == 5 and torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_random_choices_of_a_batch_depend_on_its_number():
    model = nn.Linear(1, 1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    draws = []
    with loss_mode(model):
        draws.append(draw())
        for number in (1, 0, 1):
            seed_batch(model, number)
            draws.append(draw())
    assert draws[0] == draws[2] != draws[1] == draws[3]
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def draw():
    return random.random(), np.random.random(), float(torch.rand(()))

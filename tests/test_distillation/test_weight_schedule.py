# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import math
import uuid

import pytest
import torch
from mmengine.logging import MessageHub
from small_models import build
from yolov4_samples import batch

from mmgcp.distillation import WeightSchedule
from mmgcp.errors import UserError
from mmgcp.registry import MODELS

LENGTH = dict(max_iters=1000, max_epochs=10)


def factors(schedule, iterations):
    return [schedule.factor_at(iteration, **LENGTH) for iteration in iterations]


def test_warmup_in_epochs():
    schedule = WeightSchedule(warmup=2)
    assert factors(schedule, [0, 50, 199, 200, 999]) == pytest.approx([0, 0.25, 0.995, 1, 1])


def test_warmup_as_a_share():
    schedule = WeightSchedule(warmup=0.4)
    assert factors(schedule, [0, 100, 400, 999]) == pytest.approx([0, 0.25, 1, 1])


def test_linear_decay_begins_after_the_warmup():
    schedule = WeightSchedule(warmup=2, decay='linear', final_factor=0.2)
    assert factors(schedule, [100, 200, 600, 1000]) == pytest.approx([0.5, 1, 0.6, 0.2])


def test_cosine_decay_ends_at_the_stop_epoch():
    schedule = WeightSchedule(decay='cosine', stop_epoch=5)
    assert factors(schedule, [0, 250, 400]) == pytest.approx(
        [1, 0.5, (1 + math.cos(0.8 * math.pi)) / 2])
    assert factors(schedule, [500, 999]) == [None, None]


def test_stop_epoch_alone():
    assert factors(WeightSchedule(stop_epoch=3), [0, 299, 300, 999]) == [1, 1, None, None]


@pytest.fixture
def hub():
    """The message hub of a run of ten epochs of ten iterations."""
    hub = MessageHub.get_instance(uuid.uuid4().hex)
    hub.update_info_dict(dict(iter=0, max_iters=100, max_epochs=10))
    return hub


def test_progress_is_the_runners(hub):
    schedule = WeightSchedule(warmup=5)
    assert schedule.current_factor() == 0
    hub.update_info('iter', 10)
    assert schedule.current_factor() == pytest.approx(0.2)


def test_without_a_runner():
    MessageHub.get_instance(uuid.uuid4().hex)
    assert WeightSchedule().current_factor() == 1
    with pytest.raises(RuntimeError, match="needs MMEngine's Runner"):
        WeightSchedule(warmup=1).current_factor()


@pytest.mark.parametrize('settings, message', [
    (dict(warmup=-1), 'warmup must be .* but is -1'),
    (dict(decay='step'), "decay must be one of .* but is 'step'"),
    (dict(final_factor=2), r'final_factor must be a number in \[0, 1\], but is 2'),
    (dict(stop_epoch=0), 'stop_epoch must be .* but is 0'),
    (dict(warmup=3, stop_epoch=3), 'warmup of 3 epochs must end before the stop_epoch 3'),
    (dict(begin=3), "schedule has an unknown option 'begin'; there are warmup, decay"),
])
def test_wrong_settings(distiller_config, settings, message):
    with pytest.raises(UserError, match=message):
        MODELS.build(dict(distiller_config, schedule=settings))


def test_all_weights_follow_the_schedule(distiller_config, hub):
    distiller_config['response'] = dict(type='mmgcp.ResponseLoss', score_thr=0.)
    plain = build(distiller_config)
    distiller = build(dict(distiller_config, schedule=dict(warmup=5)))
    hub.update_info('iter', 10)
    losses, full = (model(**model.data_preprocessor(batch(), True), mode='loss')
                    for model in (distiller, plain))
    assert list(losses) == list(full)
    for name, value in losses.items():
        factor = 0.2 if name.startswith(('loss_attention', 'loss_response')) else 1.
        torch.testing.assert_close(value, factor * full[name])
    assert sum(name.startswith(('loss_attention', 'loss_response')) for name in losses) == 5


def test_after_the_stop_epoch_the_teacher_does_not_run(distiller_config, hub):
    distiller = build(dict(distiller_config, schedule=dict(stop_epoch=3)))
    runs = []
    distiller.teacher.register_forward_hook(lambda *args: runs.append(1))
    data = distiller.data_preprocessor(batch(), True)
    hub.update_info('iter', 29)
    assert 'loss_attention_backbone' in distiller(**data, mode='loss')
    assert len(runs) == 1
    hub.update_info('iter', 30)
    losses = distiller(**data, mode='loss')
    assert len(runs) == 1
    expected = distiller.student(**data, mode='loss')
    assert {name: value.item() for name, value in losses.items()} == {
        name: value.item() for name, value in expected.items()}

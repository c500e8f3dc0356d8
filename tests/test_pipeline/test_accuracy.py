# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
import torch.nn as nn
from mmengine.config import Config

from mmgcp.datasets.calibration import evaluate
from mmgcp.errors import UserError
from mmgcp.pipeline import accuracy
from mmgcp.pipeline.accuracy import AccuracyRecord, measure_accuracy
from mmgcp.utils.config import build_detector


@pytest.fixture(scope='module')
def files(modules, write_config, tmp_path_factory):
    """A config with two validation images, and its detector."""
    cfg = Config.fromfile(str(write_config(tmp_path_factory.mktemp('accuracy') / 'tiny.py')))
    cfg.val_dataloader.batch_size = 1
    torch.manual_seed(0)
    return cfg, build_detector(cfg)


@pytest.mark.parametrize('number, images', [(None, 2), (1, 1), (2, 2), (50, 2)])
def test_same_images_before_and_after(files, number, images):
    cfg, model = files
    seen = []
    record = AccuracyRecord(cfg, 'pascal_voc/AP50', number, lambda *step: seen.append(step))
    state = torch.get_rng_state()
    record.before(model)
    assert torch.equal(torch.get_rng_state(), state)
    record.after(model)
    expected = evaluate(model, cfg, 'pascal_voc/AP50', images)[1]
    assert record.found == dict(metric='pascal_voc/AP50', images=images, before=expected,
                                after=expected)
    assert seen == [(f'accuracy {moment}', done, images) for moment in ('before', 'after')
                    for done in range(1, images + 1)]


class Slow(nn.Module):
    """Takes so many seconds for an image, on a clock of its own, and ten times as many at first."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.now, self.images = seconds, 0., 0

    def val_step(self, images):
        self.now += self.seconds * len(images) * (10 if self.now == 0 else 1)
        self.images += len(images)
        return images


@pytest.mark.parametrize('seconds, images', [(0.1, 300), (1., 30), (60., 4), (0.001, 30000)])
def test_as_many_images_as_fit_into_half_a_minute(seconds, images, monkeypatch):
    model, asked = Slow(seconds), []

    def evaluate(model, cfg, metric, number, progress=None):
        asked.append(number)
        model.val_step([None] * number)
        return 'mAP', 0.5

    monkeypatch.setattr(accuracy, 'evaluate', evaluate)
    monkeypatch.setattr(accuracy.time, 'monotonic', lambda: model.now)
    record = AccuracyRecord(Config())
    record.before(model)
    assert asked[:-1] == [1, 4] and asked[-1] == pytest.approx(images, abs=1)
    assert record.found == dict(metric='mAP', images=asked[-1], before=0.5)


def test_turned_off(files):
    record = AccuracyRecord(*files[:1], num_images=0)
    record.before(None)
    record.after(None)
    assert record.found == {}


def test_no_data(files):
    """One reason, unless accuracy was asked for."""
    cfg = Config(files[0].to_dict())
    cfg.pop('val_dataloader')
    record = AccuracyRecord(cfg)
    record.before(files[1])
    record.after(files[1])
    assert record.found == dict(
        not_measured='the validation data cannot be loaded: the config has no val_dataloader')
    for asked in (dict(num_images=1), dict(metric='mAP')):
        with pytest.raises(UserError, match='the config has no val_dataloader'):
            AccuracyRecord(cfg, **asked).before(files[1])


def test_what_was_done_is_not_lost(files, monkeypatch):
    cfg, model = files
    record = AccuracyRecord(cfg, num_images=1)
    record.before(model)

    def fail(*_):
        raise UserError('the disk is gone')

    monkeypatch.setattr(accuracy, 'evaluate', fail)
    record.after(model)
    assert record.found == dict(not_measured='the disk is gone')


def test_images_are_counted(files):
    found = measure_accuracy(files[1], files[0], num_images=2)
    assert (found.metric, found.images) == ('pascal_voc/mAP', 2) and 0 <= found.value <= 1

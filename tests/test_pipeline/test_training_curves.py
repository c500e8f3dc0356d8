# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import json
import math

import cv2
import pytest

from mmgcp.analysis.stage_plots import StageCurve, plot_stages
from mmgcp.errors import UserError
from mmgcp.pipeline.training_curves import draw_curves

ROWS = [dict(stage=stage, mAP50=value) for stage, value in (
    ('baseline', 0.8), ('sparse', 0.7), ('pruned', 0.6), ('distilled', 0.9))]


def write_log(folder, stage, rows, name='20240101_000000'):
    (folder / stage / name / 'vis_data').mkdir(parents=True)
    file = folder / stage / name / 'vis_data' / 'scalars.json'
    file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return file


def line(step, epoch, cls, bbox=1., **more):
    return dict(step=step, epoch=epoch, loss=cls + bbox + sum(more.values()), loss_cls=cls,
                loss_bbox=bbox, **more)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The curves that are drawn of a folder."""
    calls = []
    monkeypatch.setattr('mmgcp.pipeline.training_curves.plot_stages',
                        lambda *args: (calls.append(args), args[2].write_text('')))

    def draw(rows=ROWS):
        assert draw_curves(tmp_path, rows, tmp_path / 'curves.png')
        return calls.pop()[0]

    return draw


def test_stages(tmp_path, drawn):
    """Losses that distilling adds do not count for the detector; tests are its accuracies."""
    write_log(tmp_path, 'baseline', [line(10, 1, 4.), line(30, 2, 2.), {'lr': 0.1}])
    write_log(tmp_path, 'sparse', [line(10, 1, 2., sparsity_loss=0.)])
    write_log(tmp_path, 'distilled', [line(20, 1, 3., loss_attention=5.)])
    assert drawn() == [
        StageCurve('baseline', [10 / 15, 2.], [5., 3.], [5., 3.], [], None, 0.8),
        StageCurve('sparse', [1.], [3.], [3.], [], 0.8, 0.7),
        StageCurve('distilled', [1.], [4.], [9.], [], 0.6, 0.9)]


def test_validations(tmp_path, drawn):
    """VOC's and COCO's; the step of their lines is the epoch."""
    write_log(tmp_path, 'sparse', [
        line(10, 1, 4.), {'pascal_voc/AP50': 0.5, 'pascal_voc/mAP': 0.3, 'step': 1},
        line(20, 2, 3.), {'coco/bbox_mAP_50': 0.6, 'step': 2}])
    curve, = drawn()
    assert curve.validated == [(1., 0.5), (2., 0.6)] and curve.epochs == [1., 2.]


def test_resumed(tmp_path, drawn):
    write_log(tmp_path, 'baseline', [line(10, 1, 4.), line(20, 2, 3.)], '20240101_000000')
    write_log(tmp_path, 'baseline', [line(20, 2, 2.), line(30, 3, 1.)], '20240102_000000')
    assert drawn()[0].losses == [5., 3., 2.]


def test_given_checkpoint(tmp_path, drawn):
    """Then no baseline has been trained."""
    write_log(tmp_path, 'sparse', [line(10, 1, 4.)])
    write_log(tmp_path, 'distilled', [line(10, 1, 4., loss_attention=1.)])
    assert [(curve.name, curve.losses) for curve in drawn()] == [
        ('sparse', [5.]), ('distilled', [5.])]


def test_log_of_a_stage_that_is_no_longer_there(tmp_path, drawn):
    for stage in ('baseline', 'sparse'):
        write_log(tmp_path, stage, [line(10, 1, 4.)])
    assert [curve.name for curve in drawn([row for row in ROWS if row['stage'] != 'sparse'])] == [
        'baseline']


def test_nothing_has_been_logged(tmp_path):
    write_log(tmp_path, 'baseline', [])
    assert not draw_curves(tmp_path, ROWS, tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize('row', [[1], dict(loss=1.), dict(line(10, 1, 2.), loss='x'),
                                 dict(line(10, 1, 2.), loss_cls=None)])
def test_foreign_log(tmp_path, row):
    write_log(tmp_path, 'baseline', [line(10, 1, 4.), row])
    with pytest.raises(UserError, match='is not the log of a training: line 2 is'):
        draw_curves(tmp_path, ROWS, tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize('losses', [[3., 2.], [300., 2.], [math.nan] * 2, [0., 0.], [math.inf, 1.],
                                    [-1., 1.]])
@pytest.mark.parametrize('accuracy', [None, 0., 0.5, math.nan])
def test_picture(tmp_path, losses, accuracy):
    """Whatever the numbers are, there is one, with a column for each stage."""
    totals = [2 * loss for loss in losses]
    for number in (1, 3):
        stages = [StageCurve(f'stage {index}', [0.5, 1.], losses, totals, [], accuracy, accuracy)
                  for index in range(number)]
        plot_stages(stages, 'mAP50', tmp_path / 'curves.png')
        image = cv2.imread(str(tmp_path / 'curves.png'))
        assert image.shape[:2] == (660, round(120 * (1.5 + 3.4 * number))) and image.std() > 10

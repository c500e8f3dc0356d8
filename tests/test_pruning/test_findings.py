# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What reports say of the accuracy and of layer groups that are nearly gone."""
import json

import pytest
import torch.nn as nn

from mmgcp.pruning import PruningPlan, PruningResult, UnitPlan
from mmgcp.pruning.report import summarize, write_report

ALONE = 'accuracy not measured: the config has no val_dataloader'


def make_result(left=6, accuracy=None, **more):
    """A result in which the group two keeps so many of 16 channels, and the group one half."""
    plan = PruningPlan(units=[UnitPlan('a', {'a': 'one', 'b': 'two'}, 16, []),
                              UnitPlan('c', {'c': 'two'}, 8, [])])
    before = {'a': [3, 16], 'b': [3, 8], 'c': [16, 8], 'pred': [8, 2]}
    after = {'a': [3, 8], 'b': [3, 1], 'c': [8, left - 1], 'pred': [left - 1, 2]}
    return PruningResult(nn.Identity(), plan, before, after, [100, 70], [1000, 600], {},
                         accuracy=accuracy or {}, **more)


def measured(before, after):
    return dict(metric='coco/bbox_mAP', images=151, before=before, after=after)


def warnings_in(result):
    return [line for line in summarize(result).splitlines() if line.startswith('warning')]


@pytest.mark.parametrize('before, after, line', [
    (0.55, 0.321, '0.550 -> 0.321 coco/bbox_mAP on 151 validation images (-41.6%)'),
    (0., 0., '0.000 -> 0.000 coco/bbox_mAP on 151 validation images'),
    (4e-4, 3e-4, '0.000 -> 0.000 coco/bbox_mAP on 151 validation images'),
    (0.5, 0.125, '0.500 -> 0.125 coco/bbox_mAP on 151 validation images (-75.0%)')])
def test_accuracy_before_and_after(before, after, line):
    result = make_result(accuracy=measured(before, after))
    (found, ) = [item for item in summarize(result).splitlines() if item.startswith('accuracy')]
    assert ' '.join(found.split()) == f'accuracy {line}'
    assert warnings_in(result) == []  # a quarter is left


def test_accuracy_that_was_not_measured():
    result = make_result(accuracy=dict(not_measured='the config has no val_dataloader'))
    assert ALONE in summarize(result).splitlines()
    assert 'accuracy' not in summarize(make_result())


@pytest.mark.parametrize('more, words', [
    ({}, ('12% of the accuracy is left (compensation: none)', 'remove less',
          'compensate by reconstruct', 'let it recover with --recover-minutes',
          'tools/train.py')),
    (dict(compensation='fold-means'), ('(compensation: fold-means)', 'by reconstruct')),
    (dict(compensation='reconstruct'), ('(compensation: reconstruct)', )),
    (dict(compensation='reconstruct', recovery=dict(minutes=1)), ('for longer than before', ))])
def test_little_accuracy(more, words):
    (line, ) = warnings_in(make_result(accuracy=measured(0.5, 0.06), **more))
    assert all(word in line for word in words)
    assert ('by reconstruct' in line) == (more.get('compensation') != 'reconstruct')


def test_no_accuracy():
    (line, ) = warnings_in(make_result(accuracy=measured(0.5, 0.)))
    assert line.startswith('warning: nothing of the accuracy is left (compensation: none); ')


@pytest.mark.parametrize('left, named', [(3, True), (4, False), (16, False)])
def test_layer_groups_of_which_less_than_a_quarter_is_left(left, named):
    assert warnings_in(make_result(left)) == [
        'warning: less than a quarter of the channels is left in two (3 of 16)'] * named


def test_files(tmp_path):
    result = make_result(3, measured(0.5, 0.06))
    write_report(result, tmp_path)
    assert json.loads((tmp_path / 'report.json').read_text())['accuracy'] == measured(0.5, 0.06)
    assert summarize(result) in (tmp_path / 'report.md').read_text()

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Other packages are changed when a class of mmgcp is first used, and never by the import."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from scripts import ROOT, run_code
from tiny_runner import tiny_runner

from mmgcp.compatibility import mend_openmmlab, version_number

NEEDS_MENDING = version_number(torch.__version__) >= (2, 6, 0)

STATE = """
import torch, mmdet, mmyolo
from mmdet.evaluation import CocoMetric
from mmdet.models.dense_heads import SSDHead

def foreign_globals():
    if not hasattr(torch.serialization, 'get_safe_globals'):
        return []
    pairs = [item if isinstance(item, tuple) else (item, item.__module__)
             for item in torch.serialization.get_safe_globals()]
    return [name for _, name in pairs if not name.startswith('torch.')]

def state():
    return (foreign_globals(), hasattr(SSDHead, 'loss_cls'),
            hasattr(CocoMetric.compute_metrics, '__wrapped__'))

before = state()
"""


def run_python(code, *arguments):
    """Run code in a fresh process and return what it prints."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    result = run_code(code, *arguments, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_importing_mmgcp_changes_nothing_else():
    code = STATE + """
import mmgcp, mmgcp.pipeline, mmgcp.darknet, mmgcp.analysis
assert state() == before == ([], False, False), state()
"""
    assert 'mended' not in run_python(code)


@pytest.mark.parametrize('use', [
    "mmengine.registry.HOOKS.build(dict(type='mmgcp.DynamicSparsityHook'))",
    "mmgcp.utils.checkpoint.read_checkpoint(write_checkpoint())",
])
def test_the_first_use_mends_and_is_logged_once(use):
    code = STATE + f"""
import tempfile, mmengine, mmgcp, mmgcp.utils.checkpoint

def write_checkpoint():
    path = tempfile.NamedTemporaryFile(suffix='.pth', delete=False).name
    torch.save(dict(), path)
    return path

{use}
{use}
names, predicts, rates = state()
assert predicts and rates and ('builtins.getattr' in names) == {NEEDS_MENDING}, names
"""
    assert run_python(code).count('mmgcp has mended other packages') == 1


def test_runner_resumes_with_a_hook_of_mmgcp(tmp_path):
    """As MMYOLO's own train.py does: nobody calls mend_openmmlab()."""
    first = tiny_runner(tmp_path)
    first.train()
    code = """
import sys
from tiny_runner import tiny_runner
import mmgcp
folder = sys.argv[1]
runner = tiny_runner(folder, [dict(type='mmgcp.DynamicSparsityHook', histogram_interval=0)],
                     resume=True, load_from=f'{folder}/epoch_1.pth')
runner.train()
print('iterations', runner.iter)
"""
    output = run_python(code, tmp_path)
    assert 'iterations 4' in output and 'Epoch(train) [2]' in output
    assert 'Epoch(train) [1]' not in output


def test_ssd_predicts():
    """Heads that have a loss keep theirs."""
    from mmdet.models.dense_heads import RetinaHead, SSDHead
    mend_openmmlab()
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = SSDHead(num_classes=2, in_channels=(4, ), anchor_generator=dict(
            type='SSDAnchorGenerator', scale_major=False, input_size=300, strides=[8],
            ratios=[[2]], min_sizes=[30], max_sizes=[60]), test_cfg=ConfigDict(
                nms_pre=10, nms=dict(type='nms', iou_threshold=0.45), score_thr=0.02,
                max_per_img=5))
        other = RetinaHead(num_classes=2, in_channels=4)
    meta = dict(img_shape=(32, 32), scale_factor=(1., 1.))
    found, = head.predict_by_feat(*head((torch.rand(1, 4, 4, 4), )), batch_img_metas=[meta])
    assert 0 < len(found) <= 5 and other.loss_cls is not None


OBJECTS = ((0, 1, [4., 4., 20., 20.]), (1, 2, [0., 0., 50., 60.]))


def coco_metric(folder, objects=OBJECTS, **options):
    """A metric for two images and three classes, with the image, class and box of objects."""
    mend_openmmlab()
    (folder / 'truth.json').write_text(json.dumps(dict(
        images=[dict(id=number, width=64, height=64) for number in range(2)],
        categories=[dict(id=number, name=name) for number, name in enumerate('abc')],
        annotations=[dict(
            id=number, image_id=image, category_id=label, bbox=box, area=box[2] * box[3],
            iscrowd=0, segmentation=[[0., 0., 0., 9., 9., 9.]])
            for number, (image, label, box) in enumerate(objects, 1)])))
    metric = CocoMetric(ann_file=str(folder / 'truth.json'), **options)
    metric.dataset_meta = dict(classes=tuple('abc'))
    return metric


def rate(metric, boxes=(), labels=(), masks=None):
    """The metrics of what is found in the first of two images, and nothing in the second."""
    for image in range(2):
        number = len(boxes) if image == 0 else 0
        found = dict(bboxes=torch.tensor(boxes[:number]).view(-1, 4),
                     labels=torch.tensor(labels[:number], dtype=torch.long),
                     scores=torch.ones(number))
        if masks is not None:
            found['masks'] = torch.zeros(number, 64, 64, dtype=torch.bool)
        metric.process({}, [dict(img_id=image, ori_shape=(64, 64), pred_instances=found)])
    return metric.evaluate(2)


def test_coco_rates_a_detector_that_finds_nothing(tmp_path):
    values = rate(coco_metric(tmp_path))
    names = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']
    # None of the objects is as large as 96 pixels squared
    assert values == {**{f'coco/bbox_{name}': 0. for name in names}, 'coco/bbox_mAP_l': -1.}
    assert rate(coco_metric(tmp_path, objects=())) == {f'coco/bbox_{name}': -1. for name in names}


def test_coco_rates_what_is_found_as_before(tmp_path):
    values = rate(coco_metric(tmp_path), [[4., 4., 24., 24.]], [1])
    assert values['coco/bbox_mAP'] == 0.5  # one of two classes
    missed = rate(coco_metric(tmp_path), [[40., 40., 44., 44.]], [0])
    assert missed == rate(coco_metric(tmp_path))


@pytest.mark.parametrize('options, names', [
    (dict(metric='segm'), {'coco/segm_mAP', 'coco/segm_mAP_50', 'coco/segm_mAP_75',
                           'coco/segm_mAP_s', 'coco/segm_mAP_m', 'coco/segm_mAP_l'}),
    (dict(metric=['bbox', 'segm'], metric_items=['mAP_50']),
     {'coco/bbox_mAP_50', 'coco/segm_mAP_50'}),
    (dict(metric='bbox', classwise=True, metric_items=['mAP']),
     {'coco/bbox_mAP', 'coco/a_precision', 'coco/b_precision', 'coco/c_precision'}),
    (dict(metric='proposal', metric_items=['AR@100']), {'coco/AR@100'}),
])
def test_coco_rates_nothing_in_every_way(tmp_path, options, names):
    values = rate(coco_metric(tmp_path, **options), masks=True)
    assert set(values) == names
    assert {value for value in values.values() if not np.isnan(value)} <= {0., -1.}
    assert 0. in values.values()


def test_coco_writes_what_is_found_and_no_more(tmp_path):
    for options in ({}, dict(format_only=True)):
        metric = coco_metric(tmp_path, outfile_prefix=str(tmp_path / 'found'), **options)
        assert (rate(metric) == {}) == bool(options)
        assert json.loads((tmp_path / 'found.bbox.json').read_text()) == []
        assert metric.outfile_prefix == str(tmp_path / 'found')

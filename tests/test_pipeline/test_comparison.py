# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Originals and pruned detectors of several families, side by side."""
import sys

import pytest
from deployment_samples import YOLOV4, narrow_config, narrow_detector
from tiers import slow_except

from mmgcp.analysis import count_complexity
from mmgcp.errors import UserError
from mmgcp.pipeline.compare_options import CompareOptions
from mmgcp.pipeline.comparison import (
    INT8,
    ONNX,
    TORCH,
    Comparison,
    Entry,
    compare,
    different_names,
)
from mmgcp.pipeline.comparison_report import format_comparison, markdown_table

FAMILIES = [YOLOV4, 'yolov5-n', 'yolov8-n', 'rtmdet-tiny']


def pair(name):
    """An original and a pruned detector whose images are small."""
    cfg = narrow_config(name)
    entries = [Entry(title, narrow_detector(cfg, ratio), cfg)
               for title, ratio in (('original', 0.), ('pruned', 0.4))]
    for entry in entries:
        entry.shape = (3, 64, 96)
    return entries


@pytest.mark.parametrize('name', slow_except([YOLOV4, 'rtmdet-tiny'], FAMILIES))
def test_original_and_pruned(name):
    entries = pair(name)
    found = compare(entries, CompareOptions(rounds=2, val_images=0))
    assert found.notes == []
    first, second = found.rows
    for entry, row in zip(entries, found.rows):
        assert (row['parameters'], row['macs']) == count_complexity(entry.model, (3, 64, 96))
        assert row['input_size'] == [96, 64] and 'metric' not in row
        assert set(row['latency_ms']) == {TORCH, ONNX} and min(row['latency_ms'].values()) > 0
        assert row['peak_memory_bytes'] > 4 * 3 * 64 * 96
    assert first['promise_kept'] == {TORCH: 1., ONNX: 1.}
    for kind in (TORCH, ONNX):
        share = second['macs'] / first['macs']
        assert second['promise_kept'][kind] == pytest.approx(second['speedup'][kind] * share)
    for key in ('parameters', 'macs', 'peak_memory_bytes'):
        assert second[key] < first[key]
    assert second['file_bytes'][ONNX] < first['file_bytes'][ONNX]
    assert first['file_bytes'][ONNX] > 4 * 0.9 * first['parameters']


def test_detector_that_cannot_be_exported():
    """What can be measured is."""
    cfg = narrow_config('faster-rcnn-r50')
    entry = Entry('two stages', narrow_detector(cfg), cfg)
    entry.shape = (3, 64, 64)
    found = compare([entry], CompareOptions(rounds=1, val_images=0))
    (row, ), (note, ) = found.rows, found.notes
    assert set(row['latency_ms']) == {TORCH} and row['file_bytes'] == {}
    assert note == ('two stages is not measured in onnxruntime: a FasterRCNN cannot be exported: '
                    'only detectors of one stage can')
    assert 'onnxruntime' not in format_comparison(found, CompareOptions()).splitlines()[0]


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_without_a_package(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    found = compare(pair('yolov5-n'), CompareOptions(rounds=1, val_images=0, int8=True))
    assert found.notes == [
        f'not measured in onnxruntime: that needs {package} (pip install {package})']
    assert all(set(row['latency_ms']) == {TORCH} for row in found.rows)
    header, *_, note = format_comparison(found, CompareOptions()).splitlines()
    assert 'PyTorch: ms' in header and 'ONNX' not in header and 'int8' not in header
    assert note == found.notes[0]


def test_without_data():
    """Nothing but accuracies and integers is missing; a metric that is asked for is an error."""
    entries = pair('yolov5-n')
    found = compare(entries, CompareOptions(rounds=1, int8=True))
    assert len(found.notes) == 4 and all(set(row['latency_ms']) == {TORCH, ONNX}
                                         for row in found.rows)
    for name, note in zip(('original', 'pruned'), found.notes):
        assert note.startswith(f'the accuracy of {name} is not measured: the validation data '
                               'cannot be loaded: ')
    for name, note in zip(('original', 'pruned'), found.notes[2:]):
        assert note.startswith(f'{name} is not measured with integers: the calibration images '
                               'cannot be loaded: ')
    with pytest.raises(UserError, match='the validation data cannot be loaded'):
        compare(entries, CompareOptions(metric='coco/bbox_mAP'))


@pytest.mark.parametrize('paths, names', [
    (['a/one.pth', 'b/two.pth'], ['one', 'two']),
    (['a/pruned.pth', 'b/pruned.pth', 'b/c.pth'], ['a/pruned', 'b/pruned', 'b/c']),
    (['a.pth', 'x/a.pth'], ['a', 'x/a']),
    (['a.pth', 'a.pth'], ['a 1', 'a 2']),
    (['https://x.org/y/a.pth'], ['a'])])
def test_names(paths, names):
    assert different_names(paths) == names


def row(name, macs, **more):
    return dict(dict(
        name=name, input_size=[64, 32], parameters=2 * 10**6, macs=macs, checkpoint_bytes=2**21,
        peak_memory_bytes=2**22, file_bytes={}, latency_ms={TORCH: 10.}), **more)


def test_table():
    rows = [row('one', 4 * 10**9, metric='coco/bbox_mAP', val_images=5, accuracy={TORCH: 0.5}),
            row('two', 10**9, parameters=10**6, checkpoint_bytes=None,
                latency_ms={TORCH: 5., INT8: 4.}, promise_kept={TORCH: 0.5, INT8: 0.4},
                file_bytes={INT8: 2**20}, metric='coco/bbox_mAP', val_images=5,
                accuracy={TORCH: 0.25, INT8: 0.2})]
    text = format_comparison(Comparison(rows, ['a note']), CompareOptions(rounds=7, threads=2))
    table = [[cell.strip() for cell in line.strip('|').split('|')]
             for line in text.splitlines()[:4]]
    assert table[0] == ['detector', 'bbox_mAP', 'parameters', 'MACs', 'checkpoint', 'memory',
                        'PyTorch: ms', 'promise', 'int8: bbox_mAP', 'int8: file', 'int8: ms',
                        'promise']
    assert table[2] == ['one', '0.500', '2.000 M', '4.000 G', '2.00 MiB', '4.00 MiB', '10.00',
                        '–', '–', '–', '–', '–']
    assert table[3] == ['two', '0.250', '1.000 M -50.0%', '1.000 G -75.0%', '–', '4.00 MiB',
                        '5.00', '50%', '0.200', '1.00 MiB', '4.00', '40%']
    assert len(set(map(len, text.splitlines()[:4]))) == 1
    legend = text.splitlines()[5]
    for words in ('64 x 32 pixels', '7 rounds, on 2 threads', 'against one arrives',
                  'coco/bbox_mAP on the first 5 validation images'):
        assert words in legend
    assert text.splitlines()[-1] == 'a note'


def test_aligned():
    assert markdown_table(['a', 'bcd'], [['efghi', 'j']]) == [
        '| a     | bcd |', '| :---- | --: |', '| efghi |   j |']

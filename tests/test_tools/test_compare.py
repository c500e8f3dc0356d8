# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/analysis_tools/compare.py on a detector and a pruned one, with data."""
import json
import sys

import cv2
import pytest
from scripts import output_of, write_pruning_files

TOOL = 'analysis_tools/compare.py'
FILES = ['comparison.json', 'comparison.md', 'comparison.png']


@pytest.fixture(scope='module')
def files(tmp_path_factory, write_config):
    """Config and checkpoint of a tiny detector, and of the pruned one."""
    folder = tmp_path_factory.mktemp('compare')
    config, checkpoint = write_pruning_files(write_config(folder / 'tiny.py'))
    output_of('prune.py', config, checkpoint, '--work-dir', folder / 'pruned', '--target-flops',
              0.5, '--round-to', 1, '--criterion', 'L1Norm', '--no-compensate', '--val-images', 0)
    return config, checkpoint, folder / 'pruned/pruned.py', folder / 'pruned/pruned.pth'


def test_all_columns(files, tmp_path):
    printed = output_of(TOOL, *files, '--rounds', 2, '--val-images', 2, '--int8',
                        '--calib-batches', 1, '--work-dir', tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == FILES
    table = (tmp_path / 'out/comparison.md').read_text()
    assert table.split('\n\n![')[0] in printed
    header, _, *rows = printed.splitlines()[:4]
    for title in (' mAP ', 'int8: mAP', 'PyTorch: ms', 'onnxruntime: ms', 'int8: ms'):
        assert title in header
    assert [row.split('|')[1].strip() for row in rows] == ['tiny', 'pruned']
    assert 'pascal_voc/mAP on the first 2 validation images' in printed
    found = json.loads((tmp_path / 'out/comparison.json').read_text())
    first, second = found['detectors']
    assert second['macs'] == pytest.approx(0.5 * first['macs'], rel=0.01)
    assert first['checkpoint'] == str(files[1]) and first['input_size'] == [96, 96]
    for row in (first, second):
        assert set(row['latency_ms']) == {'PyTorch', 'onnxruntime', 'int8'}
        assert set(row['accuracy']) == {'PyTorch', 'int8'} and row['val_images'] == 2
        assert row['file_bytes']['int8'] < row['file_bytes']['onnxruntime']
    picture = cv2.imread(str(tmp_path / 'out/comparison.png'))
    assert picture.shape[1] == 11 * 120 and picture.std() > 10


def test_data_in_place_of_the_configs(config_files, demo_root, tmp_path):
    """Those of tiny.py do not exist."""
    printed = output_of(TOOL, *config_files, '--data', demo_root, '--val-images', 1, '--rounds', 1,
                        '--names', 'mine', '--work-dir', tmp_path)
    assert 'pascal_voc/mAP on the first 1 validation images' in printed
    assert printed.splitlines()[2].startswith('| mine')


def test_without_onnxruntime_and_data(config_files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    printed = output_of(TOOL, *config_files, '--rounds', 1, '--work-dir', tmp_path)
    assert 'onnxruntime: ms' not in printed and 'mAP' not in printed.splitlines()[0]
    assert ('not measured in onnxruntime: that needs onnxruntime (pip install onnxruntime)'
            in printed.splitlines())
    assert 'the accuracy of tiny is not measured: the validation data cannot be loaded' in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    picture = cv2.imread(str(tmp_path / 'comparison.png'))
    assert picture.shape[1] == 7 * 120 and picture.std() > 10

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What tools/prune.py says of the accuracy before and after."""
import json

import pytest
from scripts import output_of, write_pruning_files

OPTIONS = ('--target-params', 0.5, '--criterion', 'L1Norm', '--no-compensate')


@pytest.fixture(scope='module')
def files(tmp_path_factory, write_config):
    """Config and checkpoint of a tiny detector with two validation images."""
    return write_pruning_files(write_config(tmp_path_factory.mktemp('accuracy') / 'tiny.py'))


def accuracy_in(folder):
    return json.loads((folder / 'report.json').read_text())['accuracy']


@pytest.mark.parametrize('options, metric, images', [
    ((), 'pascal_voc/mAP', 2), (('--val-images', 1, '--metric', 'pascal_voc/AP50'),
                                'pascal_voc/AP50', 1)])
def test_before_and_after(files, tmp_path, options, metric, images):
    printed = output_of('prune.py', *files, *OPTIONS, *options, '--work-dir', tmp_path)
    (line, ) = [line for line in printed.splitlines() if line.startswith('accuracy')]
    assert f'{metric} on {images} validation images' in line
    assert line in (tmp_path / 'report.md').read_text()
    found = accuracy_in(tmp_path)
    assert (found['metric'], found['images']) == (metric, images)
    assert 0 <= found['after'] <= 1 and 0 <= found['before'] <= 1


def test_detector_that_is_torn_down(files, tmp_path, monkeypatch):
    """In report and output: what was measured, and what to do."""
    values = iter([0.4, 0.04])
    monkeypatch.setattr('mmgcp.pipeline.accuracy.evaluate',
                        lambda *args: ('pascal_voc/mAP', next(values)))
    printed = output_of('prune.py', *files, *OPTIONS, '--val-images', 2, '--work-dir', tmp_path)
    assert 'warning: only 10% of the accuracy is left (compensation: none); remove less' in printed
    assert accuracy_in(tmp_path)['after'] == 0.04


def test_no_data(config_files, tmp_path):
    printed = output_of('prune.py', *config_files, *OPTIONS, '--work-dir', tmp_path)
    (line, ) = [line for line in printed.splitlines() if 'accuracy' in line]
    assert line.startswith('accuracy not measured: the validation data cannot be loaded: ')
    assert line in (tmp_path / 'report.md').read_text()
    assert list(accuracy_in(tmp_path)) == ['not_measured']


@pytest.mark.parametrize('option', [('--val-images', 0), ('--dry-run', )])
def test_not_asked_for(files, tmp_path, option):
    printed = output_of('prune.py', *files, *OPTIONS, *option, '--work-dir', tmp_path)
    assert 'accuracy' not in printed and 'mAP' not in printed

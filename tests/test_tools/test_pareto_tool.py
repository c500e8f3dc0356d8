# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""tools/analysis_tools/pareto.py on a tiny detector with data."""
import json

import cv2
import pytest
from scripts import complaint_of, output_of, write_pruning_files

from mmgcp.utils.config import build_detector, load_config

TOOL = 'analysis_tools/pareto.py'
SMALL = ('--calib-batches', 1, '--shares', 0.6, '--depths', 0, 1)


@pytest.fixture(scope='module')
def files(tmp_path_factory, write_config):
    """Config and checkpoint of a tiny detector."""
    folder = tmp_path_factory.mktemp('pareto')
    return write_pruning_files(write_config(folder / 'tiny.py'),
                               "\nprune_cfg = dict(allocation='uniform', round_to=1)\n")


@pytest.fixture(scope='module')
def tried(files, tmp_path_factory):
    """A finished run: its arguments, folder and output."""
    folder = tmp_path_factory.mktemp('tried') / 'out'
    arguments = (*files, *SMALL, '--val-images', 2, '--work-dir', folder)
    return arguments, folder, output_of(TOOL, *arguments)


def test_models_and_pictures(tried):
    _, folder, printed = tried
    found = json.loads((folder / 'pareto.json').read_text())
    rows = {row['name']: row for row in found['models']}
    assert list(rows) == ['original', '0-blocks-0.6', '1-blocks', '1-blocks-0.6']
    for name, row in rows.items():
        assert row['metric'] == 'pascal_voc/mAP' and row['val_images'] == 2
        if name != 'original':
            model = build_detector(load_config(str(folder / name / 'pruned.py')))
            assert row['parameters'] == sum(param.numel() for param in model.parameters())
    assert rows['1-blocks-0.6']['blocks'] == rows['1-blocks']['blocks'] != []
    assert rows['1-blocks-0.6']['macs'] == pytest.approx(0.6 * rows['original']['macs'], rel=0.011)
    assert any(row['front'] for row in found['models'])
    assert (folder / 'pareto.md').read_text().split('\n\n![')[0] in printed
    assert cv2.imread(str(folder / 'pareto.png')).std() > 10


def test_images_of_other_sizes(files, tmp_path, monkeypatch):
    """Each model is tested on them besides; plans that have been tried are not tried again."""
    arguments = (*files, '--calib-batches', 1, '--shares', 0.6, '--depths', 0, '--val-images', 2,
                 '--work-dir', tmp_path / 'out')
    output_of(TOOL, *arguments)
    monkeypatch.setattr('mmgcp.pipeline.pareto.prune', None)
    printed = output_of(TOOL, *arguments, '--image-widths', 32, 64)
    found = json.loads((tmp_path / 'out/pareto.json').read_text())
    rows = {row['name']: row for row in found['models']}
    side = rows['original']['image_size'][0]
    assert list(rows) == ['original', '0-blocks-0.6', 'original@64', 'original@32',
                          '0-blocks-0.6@64', '0-blocks-0.6@32']
    for model in ('original', '0-blocks-0.6'):
        smaller = rows[f'{model}@32']
        assert smaller['image_size'] == [32, 32] and '32×32' in printed
        assert smaller['macs'] == pytest.approx(rows[model]['macs'] * (32 / side)**2, rel=0.01)
        assert smaller['parameters'] == rows[model]['parameters']


def test_it_goes_on_where_it_ended(tried, monkeypatch):
    def fail(*_, **__):
        raise AssertionError('this has been done before')

    arguments, _, first = tried
    monkeypatch.setattr('mmgcp.pipeline.pareto.prune', fail)
    assert output_of(TOOL, *arguments) == first


def test_times(files, tmp_path):
    pytest.importorskip('onnxruntime')
    printed = output_of(TOOL, *files, '--calib-batches', 1, '--shares', 0.8, '--depths', 0,
                        '--val-images', 0, '--runtime', 'onnxruntime', '--work-dir',
                        tmp_path / 'out')
    found = json.loads((tmp_path / 'out/pareto.json').read_text())
    assert all(row['latency_ms'] > 0 for row in found['models'])
    assert ' ms ' in printed and ' loss ' in printed.splitlines()[0]
    assert (tmp_path / 'out/latency_table.json').exists()


def test_plans_that_are_not_possible(files, tmp_path):
    printed = output_of(TOOL, *files, '--calib-batches', 1, '--shares', 0.999, 0.001, '--depths',
                        1, '--val-images', 0, '--work-dir', tmp_path / 'out')
    assert '1-blocks-0.999 is not tried: without the blocks ' in printed
    assert '1-blocks-0.001 is not tried: 0.1% of the MACs cannot be reached' in printed


@pytest.mark.parametrize('arguments, message', [
    (('--depths', 99), 'the detector has 9 residual blocks that can be'),
    (('--shares', 1.5), 'shares must be a list of shares to keep'),
    (('--depths', -1), 'depths must be a list of numbers of blocks'),
])
def test_wrong_arguments(files, tmp_path, arguments, message):
    assert message in complaint_of(TOOL, *files, *arguments, '--work-dir', tmp_path / 'out')

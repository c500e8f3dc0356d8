# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The whole way with one epoch a stage, in the processes that a user would start."""
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import mmyolo
import pytest
from mmengine.config import Config
from test_tools.conftest import demo_root, run_process, write_config  # noqa: F401

ROOT = Path(__file__).resolve().parents[2]
STAGES = ['baseline', 'sparse', 'pruned', 'distilled']


@pytest.fixture(scope='module')
def compressed(tmp_path_factory, write_config, demo_root, run_process):  # noqa: F811
    """A finished run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp('compressed')
    config = write_config(folder / 'tiny.py')
    arguments = ('compress.py', config, '--work-dir', folder / 'run', '--data', demo_root)
    result = run_process(*arguments, cwd=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    again = run_process(*arguments, cwd=folder)
    return dict(folder=folder / 'run', output=result.stdout, again=again)


def test_summary(compressed):
    stages = json.loads((compressed['folder'] / 'summary.json').read_text())['stages']
    assert [row['stage'] for row in stages] == STAGES
    for row in stages:
        assert set(row) == {'stage', 'mAP50', 'mAP', 'parameters', 'macs', 'latency_ms'}
        assert 0 <= row['mAP'] <= 1 and row['latency_ms'] > 0
    baseline, sparse, pruned, distilled = stages
    assert baseline['parameters'] == sparse['parameters']
    for name in ('parameters', 'macs'):
        assert pruned[name] == distilled[name] < baseline[name]
    assert pruned['parameters'] == pytest.approx(0.353 * baseline['parameters'], rel=0.01)
    for row in stages:
        assert f'| {row["stage"]}' in compressed['output']


def test_progress_is_shown(compressed):
    for stage in ('baseline', 'sparse', 'distilled'):
        assert f'[{stage}] epoch 1 iteration' in compressed['output']


def test_picture(compressed):
    """Four rows under a title, with a column for the annotations, baseline and distilled."""
    image = cv2.imread(str(compressed['folder'] / 'detections.png'))
    assert image.shape == (32 + 4 * 326, 3 * 326, 3)
    assert image.std() > 10


def test_started_again_there_is_nothing_to_do(compressed):
    assert compressed['again'].returncode == 0
    assert 'train.py' not in compressed['again'].stdout
    assert 'test.py' not in compressed['again'].stdout
    assert '| distilled' in compressed['again'].stdout


def test_stock_tool_tests_the_distilled_student(compressed, tmp_path):
    """MMYOLO's own test.py, with the config of the pruned detector and no converter."""
    folder = compressed['folder']
    tool = Path(mmyolo.__file__).parent / '.mim' / 'tools' / 'test.py'
    result = subprocess.run(
        [sys.executable, str(tool), str(folder / 'pruned' / 'pruned.py'),
         str(folder / 'distilled' / 'epoch_1.pth'), '--work-dir', str(tmp_path)],
        cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        universal_newlines=True, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)))
    assert result.returncode == 0, result.stdout[-3000:]
    metrics = json.loads(next(tmp_path.glob('*/*.json')).read_text())
    stages = json.loads((folder / 'summary.json').read_text())['stages']
    assert metrics['pascal_voc/AP50'] == stages[-1]['mAP50']


def test_stage_configs_stand_alone(compressed):
    """Each can be run by hand: they say where they start and what they add."""
    folder = compressed['folder']
    sparse = Config.fromfile(str(folder / 'sparse.py'))
    assert sparse.load_from == str(folder / 'baseline' / 'epoch_1.pth')
    distilled = Config.fromfile(str(folder / 'distilled.py'))
    assert distilled.load_from == str(folder / 'pruned' / 'pruned.pth')
    assert distilled.model.student.type == 'mmgcp.PrunedDetector'

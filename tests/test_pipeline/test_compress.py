# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The whole way with one epoch a stage, in the processes that a user would start."""
import json
import re
from pathlib import Path

import cv2
import mmyolo
import numpy as np
import pytest
import torch
from mmengine.config import Config
from scripts import run_process

from mmgcp.datasets.demo import CLASSES
from mmgcp.pipeline.pictures import GAP, WIDTH
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.config import build_detector, load_config

STAGES = ['baseline', 'sparse', 'pruned', 'distilled']


@pytest.fixture(scope='module')
def compressed(tmp_path_factory, write_config, demo_root):
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
        assert re.search(rf'^\[{stage}\] .*Epoch\(train\) +\[1\]', compressed['output'], re.M)


def test_what_is_too_little_to_learn_from_is_said(compressed):
    """Before the training, of the images; after it, of the detector; and in the summary."""
    output = compressed['output']
    images, baseline = 'training images and no weights to begin from', 'finds too little to compare'
    assert output.index(images) < output.index('Epoch(train)') < output.index(baseline)
    assert output.count(baseline) == 2 and baseline in (
        compressed['folder'] / 'summary.md').read_text()


def test_each_stage_is_validated_once(compressed):
    """In its test, right after it, not at the end of its training."""
    assert 'Epoch(val)' not in compressed['output']
    steps = re.findall(r'^(\[\w+\]) (test.py|train.py) ', compressed['output'], re.M)
    assert steps == [
        ('[baseline]', 'train.py'), ('[baseline]', 'test.py'), ('[sparse]', 'train.py'),
        ('[sparse]', 'test.py'), ('[pruned]', 'test.py'), ('[distilled]', 'train.py'),
        ('[distilled]', 'test.py')]


def test_picture(compressed, demo_root):
    """Four rows under a title, with a column for the annotations, baseline and distilled."""
    image = cv2.imread(str(compressed['folder'] / 'detections.png'))
    names = (demo_root / 'ImageSets' / 'Main' / 'test.txt').read_text().split()
    shapes = [cv2.imread(str(demo_root / 'JPEGImages' / f'{names[index]}.jpg')).shape
              for index in np.linspace(0, len(names) - 1, 4).astype(int)]
    rows = sum(round(height * WIDTH / width) + GAP for height, width, _ in shapes)
    assert image.shape == (32 + rows, 3 * (WIDTH + GAP), 3)
    assert image.std() > 10


def test_curves(compressed):
    """A column for each stage that trains."""
    assert cv2.imread(str(compressed['folder'] / 'curves.png')).shape[1] == 120 * (1.5 + 3 * 3.4)
    assert 'warning: there is no picture' not in compressed['output']
    assert '![curves](curves.png)' in (compressed['folder'] / 'summary.md').read_text()


def test_started_again_there_is_nothing_to_do(compressed):
    assert compressed['again'].returncode == 0
    assert 'train.py' not in compressed['again'].stdout
    assert 'test.py' not in compressed['again'].stdout
    assert '| distilled' in compressed['again'].stdout


def test_stock_tool_tests_the_distilled_student(compressed, tmp_path):
    """MMYOLO's own test.py, with the config of the pruned detector and no converter."""
    folder = compressed['folder']
    tool = Path(mmyolo.__file__).parent / '.mim' / 'tools' / 'test.py'
    result = run_process(tool, folder / 'pruned/pruned.py', folder / 'distilled/epoch_1.pth',
                         '--work-dir', tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
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


RTMDET = 'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py'
NARROW = {f'model.{part}.widen_factor': 0.0625
          for part in ('backbone', 'neck', 'bbox_head.head_module')}
BLOCK = 'backbone.stage2.1.blocks.0'


@pytest.fixture(scope='module')
def rtmdet(tmp_path_factory, demo_root):
    """A finished run for a config of MMYOLO without a block, from weights for other classes."""
    folder = tmp_path_factory.mktemp('rtmdet')
    cfg = load_config(RTMDET, dict(NARROW, **{'model.backbone.init_cfg': None}))
    state = build_detector(cfg).state_dict()
    torch.save(dict(meta={}, state_dict=state), str(folder / 'of_80_classes.pth'))
    options = dict(NARROW, load_from=folder / 'of_80_classes.pth')
    options.update({'model.backbone.init_cfg': None, 'train_dataloader.batch_size': 2})
    for loader in ('train_dataloader', 'val_dataloader'):
        options.update({f'{loader}.num_workers': 0, f'{loader}.persistent_workers': False})
    result = run_process(
        'compress.py', RTMDET, '--work-dir', folder / 'run', '--data', demo_root,
        '--epochs', 1, '--sparse-epochs', 1, '--distill-epochs', 1, '--target-flops', 0.6,
        '--prune-options', f'--calib-batches 1 --remove-blocks {BLOCK}', '--cfg-options',
        *(f'{key}={value}' for key, value in options.items()), cwd=folder)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return dict(folder=folder / 'run', before=state)


@pytest.mark.slow
def test_config_of_mmyolo(rtmdet):
    stages = json.loads((rtmdet['folder'] / 'summary.json').read_text())['stages']
    assert [row['stage'] for row in stages] == STAGES
    share = stages[2]['macs'] / stages[0]['macs']
    assert 0.5 < share <= 0.6 and stages[3]['macs'] == stages[2]['macs']
    hook = Config.fromfile(str(rtmdet['folder'] / 'sparse.py')).custom_hooks[-1]
    assert (hook.penalty, hook.rate, hook.modules) == ('proximal', 0.02, 'prunable')


@pytest.mark.slow
def test_pruned_detector_of_mmyolo(rtmdet):
    """It is smaller, has the classes of the data, and takes the distilled weights."""
    folder = rtmdet['folder']
    model = build_detector(load_config(str(folder / 'pruned' / 'pruned.py')))
    load_strictly(model, str(folder / 'distilled' / 'epoch_1.pth'))
    assert isinstance(model.get_submodule(BLOCK), torch.nn.Identity)
    assert model.bbox_head.num_classes == len(CLASSES)
    full = sum(value.numel() for value in rtmdet['before'].values())
    assert sum(value.numel() for value in model.state_dict().values()) < full


@pytest.mark.slow
def test_training_from_weights_for_other_classes(rtmdet):
    """Those that fit were the start, from which three iterations do not lead far."""
    before = rtmdet['before']
    path = rtmdet['folder'] / 'baseline' / 'epoch_1.pth'
    after = torch.load(str(path), map_location='cpu', weights_only=False)['state_dict']
    name = 'backbone.stem.0.conv.weight'
    assert torch.allclose(after[name], before[name], atol=0.01)
    assert before[name].std() > 0.1
    other = [key for key in before if after[key].shape != before[key].shape]
    assert other and all('rtm_cls' in key for key in other)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import re
import shutil

import torch
from scripts import complaint, complaint_of, run_process

from mmgcp.datasets.demo import CLASSES


def train_epochs(text):
    return re.findall(r'Epoch\(train\)\s+\[(\d+)\]', text)


def test_one_epoch(trained):
    assert set(train_epochs(trained['output'])) == {'1'}
    losses = re.findall(r' loss: (\S+)', trained['output'])
    assert len(losses) == 2 and all(0 < float(loss) < 100 for loss in losses)
    assert re.search(r'Epoch\(val\) \[1\]\[1/1\].*pascal_voc/AP50: ', trained['output'])
    checkpoint = torch.load(str(trained['work_dir'] / 'epoch_1.pth'), weights_only=False)
    assert checkpoint['meta']['epoch'] == 1
    assert checkpoint['state_dict']['backbone.stem.conv.weight'].shape == (8, 3, 3, 3)
    outputs = checkpoint['state_dict']['bbox_head.head_module.convs_pred.0.weight'].shape[0]
    assert outputs == 3 * (5 + len(CLASSES))


def test_resume(trained, tmp_path):
    """The second epoch goes on from the weights, optimizer and counter of the first."""
    work_dir = tmp_path / 'run'
    shutil.copytree(str(trained['work_dir']), str(work_dir))
    marker = work_dir / 'last_checkpoint'
    marker.write_text(marker.read_text().replace(str(trained['work_dir']), str(work_dir)))
    result = run_process(
        'train.py', trained['config'], '--work-dir', work_dir, '--resume', '--cfg-options',
        'train_cfg.max_epochs=2', 'default_hooks.param_scheduler.max_epochs=2', cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(train_epochs(result.stdout + result.stderr)) == {'2'}
    first, second = (torch.load(str(work_dir / f'epoch_{epoch}.pth'), weights_only=False)
                     for epoch in (1, 2))
    assert second['meta']['epoch'] == 2
    assert second['meta']['iter'] == 2 * first['meta']['iter']
    # the weights themselves; state_dict has their moving averages
    key = 'module.backbone.stem.bn.num_batches_tracked'
    assert second['ema_state_dict'][key] == 2 * first['ema_state_dict'][key] > 0
    assert second['ema_state_dict']['steps'] == 2 * first['ema_state_dict']['steps'] > 0


def test_missing_config(tmp_path):
    assert complaint_of('train.py', 'nowhere.py', cwd=tmp_path) == (
        'train.py: there is no config nowhere.py')
    assert not list(tmp_path.iterdir())


def test_faulty_config(tmp_path):
    (tmp_path / 'faulty.py').write_text('model = dict(\n')
    message = complaint_of('train.py', 'faulty.py', cwd=tmp_path)
    assert message.startswith('train.py: the config faulty.py cannot be read: SyntaxError')
    assert [path.name for path in tmp_path.iterdir()] == ['faulty.py']


def test_missing_checkpoint(write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py')
    options = ('--cfg-options', 'load_from=nowhere.pth')
    assert complaint_of('train.py', config, *options, cwd=tmp_path) == (
        'train.py: there is no checkpoint nowhere.pth to start from (load_from of the config)')
    (tmp_path / 'child.py').write_text(
        f"_base_ = '{config}'\nload_from = 'pruned/pruned.pth'\n"
        "model = dict(type='mmgcp.PrunedDetector', detector=_base_.model.type,\n"
        "             channels='pruned/pruned.py')\n")
    assert complaint_of('train.py', 'child.py', cwd=tmp_path) == (
        'train.py: there is no pruned/pruned.py, which lists the channels of the pruned detector: '
        '`python tools/prune.py CONFIG CHECKPOINT --work-dir pruned` writes it')
    assert {path.name for path in tmp_path.iterdir()} == {'tiny.py', 'child.py'}


def test_missing_data(write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py', data_root=tmp_path / 'nowhere')
    result = run_process('train.py', config, cwd=tmp_path)
    assert str(tmp_path / 'nowhere') in complaint(result)


def test_unknown_class(write_config, tmp_path):
    config = write_config(tmp_path / 'tiny.py', classes=CLASSES[:2])
    result = run_process('train.py', config, cwd=tmp_path)
    last = complaint(result)
    unknown = re.search(r"Class '(\w+)' in \S+\.xml is not one of the known classes", last)
    assert unknown.group(1) in CLASSES[2:]

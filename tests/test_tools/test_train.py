# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import argparse
import re
import shutil

import pytest
import torch
from faults import root_only, small_disk, write_training
from mmengine.config import Config
from scripts import complaint, complaint_of, load_script, run_process

from mmgcp.datasets.demo import CLASSES
from mmgcp.utils.folders import work_dir


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


@pytest.fixture(scope='module')
def tool():
    return load_script('train.py')


@pytest.mark.parametrize('resume, settings, left, chosen, says', [
    ('auto', {}, {'epoch_1.pth': 'whole', 'epoch_2.pth': 'cut'}, 'epoch_1.pth', 'is the newest'),
    ('auto', {}, {'epoch_1.pth': 'whole', 'epoch_2.pth': 'whole', 'last_checkpoint':
                  'epoch_1.pth'}, 'epoch_2.pth', ''),
    ('auto', {}, {}, None, 'has no checkpoint to resume from: the training starts from the begin'),
    (None, {}, {'epoch_1.pth': 'whole'}, None, ''),
    (None, dict(resume=True), {'epoch_1.pth': 'whole'}, 'epoch_1.pth', ''),
    (None, dict(resume=True, load_from='a.pth'), {'epoch_1.pth': 'whole'}, None, '')])
def test_checkpoint_to_resume_from(tool, tmp_path, capsys, resume, settings, left, chosen, says):
    write_training(tmp_path, left)
    args = argparse.Namespace(resume=resume)
    tool.choose_checkpoint(Config(settings), args, tmp_path)
    assert args.resume == (chosen and str(tmp_path / chosen))
    printed = capsys.readouterr().out
    assert says in printed and bool(says) == bool(printed)


@pytest.mark.parametrize('given', [None, 'epoch_2.pth'])
def test_checkpoints_that_are_not_whole(write_config, tmp_path, given):
    """Nothing is overwritten: perhaps they can be saved."""
    config, folder = write_config(tmp_path / 'tiny.py'), tmp_path / 'run'
    write_training(folder, {'epoch_2.pth': 'cut', 'last_checkpoint': 'epoch_1.pth'})
    message = complaint_of('train.py', config, '--work-dir', folder, '--resume',
                           *([folder / given] if given else []))
    assert f'{folder}/epoch_2.pth cannot be read as a checkpoint: ' in message
    assert given or message.endswith('without --resume the training starts from the beginning')
    assert sorted(path.name for path in folder.iterdir()) == ['epoch_2.pth', 'last_checkpoint']


@pytest.mark.parametrize('place', ['option', 'config', 'default'])
def test_work_dir_that_is_taken(write_config, tmp_path, monkeypatch, place):
    """As another run's, or by a file."""
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / 'tiny.py')
    folder = dict(option='one', config='two', default='work_dirs/tiny')[place]
    options = dict(option=('--work-dir', folder), default=(),
                   config=('--cfg-options', f'work_dir={folder}'))[place]
    with work_dir(tmp_path / folder):
        assert complaint_of('train.py', config, *options) == (
            f'train.py: this process works in {tmp_path}/{folder} already')
    (tmp_path / folder).parent.mkdir(exist_ok=True)
    (tmp_path / folder).write_text('mine')
    assert complaint_of('train.py', config, *options) == (
        f'train.py: {tmp_path}/{folder} is a file, not a folder to write to')


@root_only
def test_disk_without_space_for_a_checkpoint(write_config, tmp_path):
    """It is said before the training begins."""
    config = write_config(tmp_path / 'tiny.py')
    with small_disk(tmp_path / 'disk', 'size=1m') as disk:
        assert complaint_of('train.py', config, '--work-dir', disk / 'run') == (
            f'train.py: {disk}/run cannot be written to: No space left on device')
        assert not list(disk.iterdir())


@pytest.mark.parametrize('name', ['RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'])
def test_first_of_several_processes_takes_the_folder(tool, tmp_path, monkeypatch, name):
    for rank in '01':
        monkeypatch.setenv(name, rank)
        with tool.alone_in(tmp_path, 0):
            assert (tmp_path / '.lock').exists() == (rank == '0')

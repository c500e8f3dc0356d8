# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Trainings of two processes, one of which is killed; this file is also what they run."""
import os
import signal
import sys
import time
from operator import itemgetter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from scripts import ROOT, start_command
from torch.utils.data import DataLoader
from yolov4_samples import batch, build, yolov4

from mmgcp.utils.checkpoint_files import newest_checkpoint

EPOCHS, PER_EPOCH, FATAL = 3, 2, 4  # the second epoch's last iteration, counted from 1
SPARSE = [dict(type='mmgcp.DynamicSparsityHook', rate=0.1, schedule=dict(
    type='feedback', target=0.5, strength=5.), near_zero_thr=0.1)]


class KillHook(Hook):
    """Kills this process before an iteration is done."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == FATAL:
            os.kill(os.getpid(), signal.SIGKILL)


def make_model(kind, folder):
    student = dict(yolov4(widen_factor=0.0625), use_syncbn=False)
    if kind == 'sparse':
        return build(student)
    torch.manual_seed(0)
    return MODELS.build(ConfigDict(
        type='mmgcp.SpatialAttentionDistiller', student=student,
        teacher=dict(config=f'{folder}/teacher.py', checkpoint=f'{folder}/teacher.pth')))


def main(kind, name, folder, rank, fatal, port):
    """One of the processes, which goes on from the newest checkpoint of the run with this name."""
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2')
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/{name}-{port}', rank=int(rank), world_size=2)
    work_dir = Path(folder) / name
    checkpoint = newest_checkpoint(work_dir)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        model = MMDistributedDataParallel(make_model(kind, folder), broadcast_buffers=False)
        data = [batch(10 * number + int(rank)) for number in range(PER_EPOCH)]
        runner = Runner(
            model, work_dir=str(work_dir), launcher='pytorch',
            train_dataloader=DataLoader(data, collate_fn=itemgetter(0)),
            train_cfg=dict(by_epoch=True, max_epochs=EPOCHS),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.001, momentum=0.9)),
            custom_hooks=[*(SPARSE if kind == 'sparse' else []),
                          *([KillHook()] if fatal == '1' and rank == '1' else [])],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1,
                                               max_keep_ckpts=1)),
            default_scope='mmyolo', randomness=dict(seed=0), experiment_name=f'{name}-{port}',
            load_from=checkpoint, resume=checkpoint is not None)
        runner.train()


def start(kind, name, folder, number, fatal=False):
    """Start both processes, for the run of this number."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / 'tests')))
    return [start_command(
        [sys.executable, '-W', 'ignore', __file__, kind, name, folder, rank, int(fatal), number],
        PYTHONPATH=path, GLOO_SOCKET_IFNAME='lo') for rank in range(2)]


def outputs(processes):
    return [process.communicate(timeout=300)[0] for process in processes]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
@pytest.mark.parametrize('kind', ['sparse', 'distill'])
def test_killed_and_resumed(tmp_path, kind):
    """The other one ends within a minute; then both go on, to the bit as if nothing had been."""
    config = yolov4(widen_factor=0.125)
    Config(dict(default_scope='mmyolo', model=config)).dump(tmp_path / 'teacher.py')
    torch.save(dict(state_dict=build(config, 1).state_dict(), meta={}), tmp_path / 'teacher.pth')
    for name in ('whole', 'parts'):
        (tmp_path / name).mkdir()

    first, second = processes = start(kind, 'parts', tmp_path, 0, fatal=True)
    assert second.wait(300) == -signal.SIGKILL
    began = time.monotonic()
    assert first.wait(60) != 0
    assert time.monotonic() - began < 60
    outputs(processes)
    assert newest_checkpoint(tmp_path / 'parts') == str(tmp_path / 'parts' / 'epoch_1.pth')

    for name in ('parts', 'whole'):
        processes = start(kind, name, tmp_path, 1)
        printed = outputs(processes)
        assert [process.returncode for process in processes] == [0, 0], printed[0][-3000:]
        assert ('Epoch(train) [1]' in printed[0]) == (name == 'whole')
    parts, whole = (torch.load(str(tmp_path / name / f'epoch_{EPOCHS}.pth'), weights_only=False)
                    for name in ('parts', 'whole'))
    assert parts['meta']['iter'] == whole['meta']['iter'] == EPOCHS * PER_EPOCH
    assert parts['state_dict'].keys() == whole['state_dict'].keys()
    for key, value in whole['state_dict'].items():
        assert torch.equal(parts['state_dict'][key], value), key
    assert parts.get('sparsity_schedule') == whole.get('sparsity_schedule')
    assert ('sparsity_schedule' in whole) == (kind == 'sparse')


if __name__ == '__main__':
    main(*sys.argv[1:])

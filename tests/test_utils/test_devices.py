# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import argparse
import os

import pytest
import torch

from mmgcp.errors import UserError
from mmgcp.utils.devices import add_device_arguments, find_device, started


@pytest.fixture
def gpus(monkeypatch):
    """A function that pretends that there are so many GPUs, which are never used."""
    def pretend(number):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: number > 0)
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: number)
    return pretend


def test_a_gpu_if_there_is_one(gpus):
    gpus(2)
    assert find_device() == torch.device('cuda')
    assert find_device('cuda:1') == torch.device('cuda:1')
    assert find_device('cpu') == torch.device('cpu')
    gpus(0)
    assert find_device() == torch.device('cpu')


@pytest.mark.parametrize('number, name, message', [
    (0, 'cuda', 'there is no device cuda: PyTorch finds no GPU'),
    (0, 'cuda:1', 'there is no device cuda:1: PyTorch finds no GPU'),
    (2, 'cuda:2', r'there is no device cuda:2: PyTorch finds 2 GPU\(s\), counted from cuda:0'),
    (0, 'gpu', "'gpu' is not the name of a device"),
    (0, '', "'' is not the name of a device"),
    (0, 'meta', 'there is no device meta here, or it does not compute in double precision'),
])
def test_no_such_device(number, name, message, gpus):
    gpus(number)
    with pytest.raises(UserError, match=message) as error:
        find_device(name)
    assert '\n' not in str(error.value)


def test_one_process():
    with started('cpu') as device:
        assert device == torch.device('cpu')
    with pytest.raises(UserError, match='not the name of a device'), started('nowhere'):
        pass


@pytest.mark.parametrize('device, launcher, message', [
    ('cuda:1', 'pytorch', 'give --device cuda instead of cuda:1'),
    ('cpu', 'slurm', 'several processes on the cpu need --launcher pytorch'),
    ('cpu', 'pytorch', 'needs processes that torchrun, srun or mpirun has started'),
])
def test_launcher_that_does_not_fit(device, launcher, message, gpus, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    gpus(2)
    with pytest.raises(UserError, match=message) as error, started(device, launcher):
        pass
    assert '\n' not in str(error.value)
    os.environ.pop('LOCAL_RANK', None)


def test_arguments():
    parser = argparse.ArgumentParser()
    add_device_arguments(parser)
    args = parser.parse_args([])
    assert (args.device, args.launcher) == (None, 'none')
    args = parser.parse_args(
        ['--device', 'cuda:1', '--launcher', 'slurm', '--local-rank', '3'])
    assert (args.device, args.launcher, args.local_rank) == ('cuda:1', 'slurm', 3)
    with pytest.raises(SystemExit):
        parser.parse_args(['--launcher', 'ssh'])

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""dist_train.sh, dist_test.sh and dist_prune.sh, with two processes on the CPU."""
import os
import re
import socket
import sys
from pathlib import Path

import pytest
import torch
from scripts import TOOLS, pruned_weights, run_command, run_here, write_pruning_files

SCRIPTS = ('dist_launch.sh', 'dist_train.sh', 'dist_test.sh', 'dist_prune.sh')

# MMEngine chooses a GPU for each process, and gives it to the model's wrapper
CPU_ALONE = """
import torch
torch.cuda.set_device = lambda device: None
"""
WRAPPER = """
custom_imports = dict(imports=['mmgcp', 'cpu_alone'])
model_wrapper_cfg = dict(
    type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
"""
GLOO = ['--cfg-options', 'env_cfg.dist_cfg.backend=gloo', 'model.use_syncbn=False']


def run_script(name, *arguments, cwd, **env):
    """Run a shell script: its status and everything it prints."""
    result = run_command(['bash', TOOLS / name, *arguments], cwd, timeout=300, **env)
    return result.returncode, result.stdout + result.stderr


@pytest.fixture
def distributed_env(tmp_path):
    """The environment of processes without a GPU."""
    (tmp_path / 'cpu_alone.py').write_text(CPU_ALONE)
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    return dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}', PORT=str(port),
                PYTHONPATH=str(tmp_path), CUDA_VISIBLE_DEVICES='-1')


@pytest.mark.parametrize('script', SCRIPTS)
def test_syntax(script):
    assert os.access(str(TOOLS / script), os.X_OK)
    assert run_command(['bash', '-n', TOOLS / script]).returncode == 0


@pytest.mark.parametrize('script, arguments', [
    ('dist_train.sh', []), ('dist_train.sh', ['config.py']),
    ('dist_test.sh', []), ('dist_test.sh', ['config.py', 'epoch_1.pth']),
    ('dist_prune.sh', []), ('dist_prune.sh', ['config.py', 'epoch_1.pth'])])
def test_usage(script, arguments, tmp_path):
    status, output = run_script(script, *arguments, cwd=tmp_path)
    assert status == 2
    assert re.fullmatch(rf'usage: \S*{script} CONFIG .*GPUS .*\n', output)


@pytest.mark.parametrize('script, arguments', [
    ('dist_train.sh', ['a b.py', '3', '--work-dir', 'x y']),
    ('dist_test.sh', ['a b.py', 'c d.pth', '3', '--work-dir', 'x y']),
    ('dist_prune.sh', ['a b.py', 'c d.pth', '3', '--work-dir', 'x y'])])
def test_command(script, arguments, tmp_path):
    """What is run, and the environment's settings; blanks stay in the arguments."""
    python = tmp_path / 'python'
    python.write_text('#!/usr/bin/env bash\necho "$PYTHONPATH"\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    _, output = run_script(script, *arguments, cwd=tmp_path, NNODES='2', NODE_RANK='1', PORT='1234',
                           MASTER_ADDR='example.org', PYTHONPATH='/elsewhere',
                           PATH=f'{tmp_path}:{os.environ["PATH"]}')
    path, *command = output.splitlines()
    assert path == f'{TOOLS}/..:/elsewhere'
    tool = TOOLS / script.replace('dist_', '').replace('.sh', '.py')
    positional = arguments[:-3]
    assert command == [
        '-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1',
        '--master_addr=example.org', '--nproc_per_node=3', '--master_port=1234', str(tool),
        *positional, '--launcher', 'pytorch', '--work-dir', 'x y']


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_two_processes(write_config, distributed_env, tmp_path):
    """Training for an epoch of three images a process, then testing."""
    config = write_config(tmp_path / 'tiny.py')
    with config.open('a') as file:
        file.write(WRAPPER)
    status, output = run_script('dist_train.sh', config, 2, '--work-dir', tmp_path / 'run', *GLOO,
                                'train_cfg.val_interval=9', cwd=tmp_path, **distributed_env)
    assert status == 0, output[-9000:]
    assert 'Distributed launcher: pytorch' in output and 'GPU number: 2' in output
    iterations = re.findall(r'Epoch\(train\)\s+\[1\]\[\s*(\d+)/(\d+)\]', output)
    assert set(iterations) == {('1', '1')}  # six images, four a process and iteration
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    assert torch.load(str(checkpoint), weights_only=False)['meta']['iter'] == 1

    status, output = run_script('dist_test.sh', config, checkpoint, 2, '--work-dir',
                                tmp_path / 'test', *GLOO, cwd=tmp_path, **distributed_env)
    assert status == 0, output[-9000:]
    assert re.search(r'Epoch\(test\) \[1/1\].*pascal_voc/AP50: ', output)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_pruning_by_two_processes(write_config, distributed_env, tmp_path):
    """The files of one process, of which the second process writes and prints nothing."""
    config, checkpoint = write_pruning_files(write_config(tmp_path / 'tiny.py'))
    options = ['--target-params', 0.5, '--criterion', 'Taylor', '--calib-batches', 2, '--device',
               'cpu', '--sensitivity', '--val-images', 2]
    result = run_here('prune.py', config, checkpoint, '--work-dir', tmp_path / 'one', *options)
    assert result.returncode == 0, result.stderr
    status, output = run_script('dist_prune.sh', config, checkpoint, 2, '--work-dir',
                                tmp_path / 'two', *options, cwd=tmp_path, **distributed_env)
    assert status == 0, output[-9000:]
    assert output.count('written to') == output.count('parameters  ') == 1
    assert {path.name for path in tmp_path.iterdir()} == {
        'tiny.py', 'tiny.pth', 'cpu_alone.py', 'one', 'two'} | {
            path.name for path in tmp_path.glob('__pycache__')}
    for name in ('plan.json', 'report.json', 'report.md'):
        assert (tmp_path / 'one' / name).read_text() == (tmp_path / 'two' / name).read_text()
    one, two = (pruned_weights(tmp_path / name) for name in ('one', 'two'))
    for key, value in one.items():  # reconstruction sums products in single precision
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason='torch without distributed')
def test_pruning_without_a_gpu_for_each_process(distributed_env, tmp_path):
    """An error of all processes ends them with a sentence each."""
    status, output = run_script('dist_prune.sh', 'absent.py', 'absent.pth', 2, '--device', 'cuda',
                                cwd=tmp_path, **distributed_env)
    assert status == 1
    assert 'prune.py: there is no device cuda: PyTorch finds no GPU' in output
    assert 'absent.py' not in output

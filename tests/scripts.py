# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running scripts: in this process, which has imported everything, or in one of their own."""
import importlib.util
import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from mmgcp.utils.config import build_detector, load_config

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / 'tools'


def run_here(script, *arguments, cwd=None):
    """Run a script in this process.

    Args:
        script (str or Path): Its path; a relative one starts in tools/.
        arguments: Its arguments.
        cwd (str or Path, optional): The working directory.

    Returns:
        subprocess.CompletedProcess: Its status and what it printed, as of a process.
    """
    path, status = str(TOOLS / script), 0
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setattr(sys, 'argv', [path, *map(str, arguments)])
        patch.setenv('LOCAL_RANK', '0')
        if cwd:
            patch.chdir(cwd)
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as error:
            status = error.code or 0
    if isinstance(status, str):  # which the interpreter would print
        stderr.write(f'{status}\n')
        status = 1
    return subprocess.CompletedProcess(
        [sys.executable, path, *map(str, arguments)], status, stdout.getvalue(), stderr.getvalue())


def write_pruning_files(config, settings=''):
    """Add settings to the config of a detector, and write a checkpoint with uneven scales.

    Returns the paths of both files, which are side by side.
    """
    config.write_text((config.read_text() if config.exists() else '') + settings)
    torch.manual_seed(0)
    model = build_detector(load_config(str(config)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    checkpoint = config.with_suffix('.pth')
    torch.save(dict(state_dict=model.state_dict(), meta={}), str(checkpoint))
    return config, checkpoint


def quickly(files):
    """The arguments of tools/prune.py for its files, one batch, small images and few channels."""
    return (*files, '--calib-batches', 1, '--input-size', 96, 96, '--round-to', 1)


def pruned_weights(folder):
    """The weights that tools/prune.py has written to a folder."""
    return torch.load(str(folder / 'pruned.pth'), weights_only=False)['state_dict']


def run_command(command, cwd=None, timeout=None, **env):
    """Run a command with some more environment variables; return its status and output."""
    return subprocess.run([*map(str, command)], cwd=cwd and str(cwd), env=environment(env),
                          timeout=timeout, capture_output=True, text=True)


def start_command(command, **env):
    """Start a command with some more environment variables; all it prints is its output."""
    return subprocess.Popen([*map(str, command)], env=environment(env), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def environment(more):
    """The environment variables for processes that tests start, and some more."""
    return dict(dict(os.environ, PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1'), **more)


def run_process(script, *arguments, cwd=None, **env):
    """Run a script in a process of its own; a relative path starts in tools/."""
    env.setdefault('PYTHONPATH', str(ROOT))
    return run_command([sys.executable, TOOLS / script, *arguments], cwd, **env)


def run_code(code, *arguments, **env):
    """Run Python code in a process of its own."""
    env.setdefault('PYTHONPATH', str(ROOT))
    return run_command([sys.executable, '-c', code, *arguments], **env)


def load_script(script):
    """Load a script as a module; a relative path starts in tools/."""
    path = TOOLS / script
    spec = importlib.util.spec_from_file_location(f'{path.stem}_script', str(path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complaint(result):
    """Return the sentence with which a script gave up; it is alone, without a traceback."""
    assert result.returncode == 1
    assert 'Traceback' not in result.stdout + result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f'{Path(result.args[1]).name}: ')
    return last


def complaint_of(script, *arguments, cwd=None):
    """Run a script in this process until it gives up, and return why."""
    return complaint(run_here(script, *arguments, cwd=cwd))


def output_of(script, *arguments, cwd=None):
    """Run a script in this process, which has to succeed, and return what it prints to stdout."""
    result = run_here(script, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout

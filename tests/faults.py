# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Killing processes at chosen moments, and disks that are full or read-only."""
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Of the file system, as Python tells them
EVENTS = ('open', 'os.', 'shutil.', 'tempfile.', 'fcntl.')


def _can_mount():
    return (sys.platform == 'linux' and os.geteuid() == 0
            and subprocess.run(['unshare', '-m', 'true'], stderr=subprocess.DEVNULL).returncode == 0
            if Path('/usr/bin/unshare').exists() else False)


root_only = pytest.mark.skipif(not _can_mount(), reason='only root mounts a small disk')


@contextmanager
def small_disk(folder, settings):
    """Mount a disk in memory, as ``size=1m`` or ``ro``, at a folder that is made."""
    folder.mkdir()
    subprocess.run(['mount', '-t', 'tmpfs', '-o', settings, 'tmpfs', str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def kill_at(number, within=''):
    """Let this process kill itself at its event of the file system with a number.

    Only those count that name a path with the text ``within``.
    """
    left = [number]

    def hook(event, arguments):
        if event.startswith(EVENTS) and any(within in str(item) for item in arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def killed_at(number, work):
    """Do some work in a copy of this process that is killed; False if it ended before that."""
    pid = os.fork()
    if pid == 0:
        kill_at(number)
        work()
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def write_training(folder, files):
    """Make the work_dir of a training: checkpoints that are 'whole', 'cut' or 'bare', in order.

    The value of ``last_checkpoint`` is the checkpoint that it names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = dict(meta=dict(epoch=1, iter=2), state_dict=dict(weight=torch.ones(100)),
                 message_hub={}, optimizer={})
    for number, (name, kind) in enumerate(files.items()):
        path = folder / name
        if name == 'last_checkpoint':
            path.write_text(str(folder / kind))
            continue
        torch.save(dict(state_dict={}) if kind == 'bare' else whole, str(path))
        if kind == 'cut':
            path.write_bytes(path.read_bytes()[:-200])
        os.utime(str(path), (1e9 + number, 1e9 + number))

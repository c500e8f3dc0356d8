# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Choosing a device, and starting as one of several processes with a device each."""
import argparse
import io
import os
import warnings
from contextlib import contextmanager, redirect_stdout
from typing import Iterator, Optional

import torch
from mmengine.dist import init_dist, is_main_process

from mmgcp.errors import UserError

LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command line ``--device``, and ``--launcher`` with what MMEngine expects beside it.

    Args:
        parser (argparse.ArgumentParser): Gets the arguments.
    """
    group = parser.add_argument_group('device')
    group.add_argument('--device', help='where to compute, such as cuda:1 or cpu; default: on the '
                       'GPU if there is one')
    group.add_argument('--launcher', choices=LAUNCHERS, default='none',
                       help='what has started this as one of several processes, which share the '
                       'training images; default: %(default)s')
    group.add_argument('--local_rank', '--local-rank', type=int, default=0,
                       help=argparse.SUPPRESS)  # which older launchers give


def find_device(name: Optional[str] = None) -> torch.device:
    """Return a device to compute on.

    Args:
        name (str, optional): Its name, such as ``'cuda:1'``. Defaults to None: ``'cuda'`` if
            there is a GPU, otherwise ``'cpu'``.

    Returns:
        torch.device: The device.

    Raises:
        UserError: There is no such device, or it does not compute in double precision, such as
            ``'mps'``.
    """
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'{name!r} is not the name of a device, such as cuda, cuda:1 or '
                        'cpu') from None
    if device.type != 'cuda':
        try:
            torch.ones(1, dtype=torch.double, device=device).cpu()
        except Exception as error:  # each kind of device raises its own
            raise UserError(f'there is no device {name} here, or it does not compute in double '
                            'precision: use cuda or cpu') from error
    elif not torch.cuda.is_available():
        raise UserError(f'there is no device {name}: PyTorch finds no GPU')
    elif (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'there is no device {name}: PyTorch finds {torch.cuda.device_count()} '
                        'GPU(s), counted from cuda:0')
    return device


@contextmanager
def started(device: Optional[str], launcher: str = 'none',
            local_rank: int = 0) -> Iterator[torch.device]:
    """Join the other processes of a launcher, if any, and yield the device of this one.

    On GPUs, each process gets the one with its local rank. Only the first process prints, and
    shows warnings; errors of each end it.

    Args:
        device (str, optional): See :func:`find_device`.
        launcher (str): One of MMEngine's launchers, or ``'none'`` for a single process. On the
            CPU it is ``'pytorch'``. Defaults to 'none'.
        local_rank (int): Number of this process on its machine, unless the environment has
            ``LOCAL_RANK``. Defaults to 0.

    Yields:
        torch.device: The device.

    Raises:
        UserError: There is no such device, the launcher has not started this process, or the
            GPU has too little memory for what the block does.
    """
    found = find_device(device)
    if launcher == 'none':
        if found.index is not None and found.type == 'cuda':
            torch.cuda.set_device(found)
    else:
        found = _join(found, launcher, local_rank)
    with _quiet_unless_first():
        try:
            yield found
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(f'the memory of {found} is too small, try --device cpu: '
                            f'{str(error).splitlines()[0]}') from error
    if launcher != 'none':  # not after errors, when others may be waiting
        torch.distributed.destroy_process_group()


def _join(found: torch.device, launcher: str, local_rank: int) -> torch.device:
    """Join the other processes of a launcher; return the device of this one."""
    if found.index is not None:
        raise UserError(f'--launcher {launcher} gives each process a device of its own: give '
                        f'--device {found.type} instead of {found}')
    if found.type != 'cuda' and launcher != 'pytorch':
        raise UserError(f'several processes on the {found} need --launcher pytorch')
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    try:
        if found.type == 'cuda':
            init_dist(launcher, backend='nccl')
            found = torch.device('cuda', torch.cuda.current_device())
        else:
            torch.distributed.init_process_group('gloo')
    except (KeyError, RuntimeError, ValueError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'--launcher {launcher} needs processes that torchrun, srun or mpirun has '
                        f'started, each with a GPU of its own or --device cpu: {reason}') from error
    return found


@contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """Let only the first of several processes print to stdout and show warnings."""
    if is_main_process():
        yield
        return
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield

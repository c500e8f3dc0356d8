# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running a function in several processes on the CPU, which form a group of torch.distributed."""
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, start_command


def on_ranks(module, function, folder, number=2):
    """Call a function of a test module, which is given by its path, in several processes.

    It gets the folder, and returns what torch.save takes: the list of what each rank returned.
    """
    if not torch.distributed.is_available():
        pytest.skip('torch has no distributed package')
    module = Path(module)
    path = os.pathsep.join(map(str, (ROOT, ROOT / 'tests', module.parent)))
    processes = [start_command(
        [sys.executable, '-W', 'ignore', __file__, module.stem, function, folder, rank, number],
        PYTHONPATH=path, GLOO_SOCKET_IFNAME='lo') for rank in range(number)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output[-3000:]
    return [torch.load(str(folder / f'{function}-{rank}.pth'), weights_only=False)
            for rank in range(number)]


def main(module, function, folder, rank, number):
    """One of the processes."""
    os.environ.update(LOCAL_RANK=rank, RANK=rank, WORLD_SIZE=number)
    # By hand, as MMEngine's way asks for CUDA
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/{function}-rendezvous', rank=int(rank),
        world_size=int(number))
    found = getattr(importlib.import_module(module), function)(Path(folder))
    torch.save(found, str(Path(folder) / f'{function}-{rank}.pth'))
    torch.distributed.barrier()


if __name__ == '__main__':
    main(*sys.argv[1:])

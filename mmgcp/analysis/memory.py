# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The memory that a detector takes for an image."""
import os
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
import torch.nn as nn

KINETO_LOG = 'KINETO_LOG_LEVEL'  # of PyTorch's profiler, which tells when it begins and ends
ONLY_ERRORS = '9'


def measure_peak_memory(model: nn.Module, run: Callable[[], Any]) -> int:
    """Measure how much memory a model and what it computes take at most, on the CPU.

    Counted are all tensors and what PyTorch's operations take for a while, such as unfolded
    inputs of convolutions; not the program itself. So it is the same on each run.

    Args:
        model (nn.Module): The model, whose parameters and buffers are added.
        run (Callable): Runs it.

    Returns:
        int: Bytes.
    """
    run()  # what is made once
    with _quiet_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        outputs = run()
    taken = most = 0
    for event in profile.kineto_results.events():
        if event.name() == '[memory]':
            taken += event.nbytes()
            most = max(most, taken)
    del outputs  # which have been kept until the end of the block
    held = {tensor.data_ptr(): tensor.numel() * tensor.element_size()
            for tensor in (*model.parameters(), *model.buffers())}
    return most + sum(held.values())


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler from printing, unless the user wants to read it."""
    before = os.environ.get(KINETO_LOG)
    os.environ.setdefault(KINETO_LOG, ONLY_ERRORS)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(KINETO_LOG, None)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Changing state that belongs to the whole process for a while, and restoring it."""
import io
import logging
import random
import warnings
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Iterable, Iterator

import numpy as np
import torch
import torch.distributed
from mmengine.logging import MessageHub, MMLogger


@contextmanager
def random_states_kept(devices: Iterable[int] = ()) -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch at the end of the block.

    Args:
        devices (Iterable[int]): CUDA devices whose random states are restored as well as the
            CPU's. Defaults to none.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_random(seed: int, devices: Iterable[int] = ()) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch.

    Args:
        seed (int): The seed.
        devices (Iterable[int]): CUDA devices that are seeded as well as the CPU. Defaults to none.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def alone() -> Iterator[None]:
    """Let the block believe that this process is the only one of a distributed run.

    Then samplers share nothing out, and losses are not joined with those of other processes,
    which may be doing something else.
    """
    before = torch.distributed.is_initialized if torch.distributed.is_available() else None
    if before is None or not before():
        yield
        return
    torch.distributed.is_initialized = lambda: False  # MMEngine and MMDetection ask for it
    try:
        yield
    finally:
        torch.distributed.is_initialized = before


@contextmanager
def silence(with_warnings: bool = False) -> Iterator[None]:
    """Suppress what the block prints to stdout, and what it logs, except warnings.

    Args:
        with_warnings (bool): Whether warnings and what goes to stderr are suppressed as well, so
            that only errors are logged. Defaults to False.
    """
    logger = MMLogger.get_current_instance()  # which writes to the stream that it began with
    level = logger.level
    logger.setLevel(max(level, logging.ERROR if with_warnings else logging.WARNING))
    try:
        with ExitStack() as stack:
            stack.enter_context(redirect_stdout(io.StringIO()))
            if with_warnings:
                stack.enter_context(redirect_stderr(io.StringIO()))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def hub_info(name: str, value: object) -> Iterator[None]:
    """Set an entry of MMEngine's message hub inside the block, and restore it afterwards.

    Args:
        name (str): Name of the entry, such as ``'epoch'``.
        value (object): Its value.
    """
    hub = MessageHub.get_current_instance()
    before = hub.runtime_info.get(name)  # get_info has no default before MMEngine 0.7.3
    hub.update_info(name, value)
    try:
        yield
    finally:
        if before is None:
            hub.runtime_info.pop(name)
        else:
            hub.update_info(name, before)

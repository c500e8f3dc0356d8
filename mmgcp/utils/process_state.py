# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Changing state that belongs to the whole process for a while, and restoring it."""
import random
from contextlib import contextmanager
from typing import Iterable, Iterator

import numpy as np
import torch
from mmengine.logging import MessageHub


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


@contextmanager
def hub_info(name: str, value: object) -> Iterator[None]:
    """Set an entry of MMEngine's message hub inside the block, and restore it afterwards.

    Args:
        name (str): Name of the entry, such as ``'epoch'``.
        value (object): Its value.
    """
    hub = MessageHub.get_current_instance()
    before = hub.get_info(name)
    hub.update_info(name, value)
    try:
        yield
    finally:
        if before is None:
            hub.pop_info(name)
        else:
            hub.update_info(name, before)

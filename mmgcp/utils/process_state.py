# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Leaving what belongs to the whole process as it was."""
import random
from contextlib import contextmanager
from typing import Iterable, Iterator

import numpy as np
import torch
from mmengine.logging import MessageHub


@contextmanager
def random_states_kept(devices: Iterable[int] = ()) -> Iterator[None]:
    """Restore the states of the random generators of Python, NumPy and PyTorch at the end.

    Args:
        devices (Iterable[int]): CUDA devices whose generators are restored beside the CPU's.
    """
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def hub_info(name: str, value: object) -> Iterator[None]:
    """Let those who ask MMEngine's message hub for something find a value, for a while.

    Args:
        name (str): What they ask for, as ``'epoch'``.
        value (object): The value.
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

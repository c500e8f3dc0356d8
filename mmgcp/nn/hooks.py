# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Hooks of modules, and what they note on the tensors that they see."""
from contextlib import contextmanager
from typing import Any, Iterable, Iterator

from torch import Tensor

MAKER = '_mmgcp_maker'  # attribute of a tensor


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end of a block.

    Args:
        handles (Iterable): What registering the hooks returned.
    """
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def set_maker(tensor: Tensor, maker: Any) -> None:
    """Note on a tensor what made it.

    Args:
        tensor (Tensor): The tensor.
        maker (Any): What made it, not None.
    """
    setattr(tensor, MAKER, (maker, tensor._version))


def maker_of(tensor: Tensor) -> Any:
    """Return what was noted on a tensor, None if nothing was or it has been changed since."""
    maker, version = getattr(tensor, MAKER, (None, None))
    return maker if version == tensor._version else None

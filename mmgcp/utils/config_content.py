# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is in a config, as plain dicts."""
from typing import Any, Union

from mmengine.config import Config, ConfigDict


def plain_content(cfg: Union[Config, ConfigDict]) -> dict:
    """Return a copy of a config or a part of it, as dicts, lists and tuples.

    That is more than ``to_dict``, which leaves the inner ``ConfigDict`` in MMEngine 0.8: their
    ``update`` merges with what is there instead of replacing it.
    """
    return _plain(cfg.to_dict())


def type_name(kind: Any) -> str:
    """Return the name of a class, which may be given as the class, its path or a scoped name."""
    return str(getattr(kind, '__name__', kind)).split('.')[-1]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing configs so that they read as what they were."""
from pathlib import Path
from typing import Union

from mmengine.config import Config


def write_config(cfg: Config, path: Union[str, Path]) -> None:
    """Write a config as a Python file.

    Unlike ``Config.dump`` it leaves nothing for MMEngine to expand when the file is read: class
    names and paths may contain ``{{ fileDirname }}`` or ``{{$HOME:}}`` like any other text.

    Args:
        cfg (Config): The config.
        path (str | Path): The file.
    """
    Path(path).write_text(unexpanded(cfg.pretty_text), encoding='utf-8')


def unexpanded(text: str) -> str:
    """Return Python code whose strings mean the same, but in which MMEngine expands nothing."""
    return text.replace('{{', '{\\x7b')  # outside of strings, code has no two of them in a row

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing configs so that they read as what they were."""
from pathlib import Path
from typing import Sequence, Union

from mmengine.config import Config


def write_config(cfg: Config, path: Union[str, Path], expanded: Sequence[str] = ()) -> None:
    """Write a config as a Python file.

    Unlike ``Config.dump`` it leaves nothing for MMEngine to expand when the file is read: class
    names and paths may contain ``{{ fileDirname }}`` or ``{{$HOME:}}`` like any other text.

    Args:
        cfg (Config): The config.
        path (str | Path): The file.
        expanded (Sequence[str]): Values that MMEngine is to expand all the same. Defaults to none.
    """
    text = unexpanded(cfg.pretty_text)
    for value in expanded:
        text = text.replace(unexpanded(repr(value)), repr(value))
    Path(path).write_text(text, encoding='utf-8')


def unexpanded(text: str) -> str:
    """Return Python code whose strings mean the same, but in which MMEngine expands nothing."""
    return text.replace('{{', '{\\x7b')  # outside of strings, code has no two of them in a row

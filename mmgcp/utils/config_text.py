# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writing configs so that they read as what they were."""
import pprint
from pathlib import Path
from typing import Dict, Sequence, Union

from mmengine.config import Config

from .config import nested_dicts
from .config_content import plain_content

MANY_CLASSES = 100  # laying out the names and colours of 2000 in three data sets took 8 s


def write_config(cfg: Config, path: Union[str, Path], expanded: Sequence[str] = ()) -> None:
    """Write a config as a Python file.

    Unlike ``Config.dump`` it leaves nothing for MMEngine to expand when the file is read: class
    names and paths may contain ``{{ fileDirname }}`` or ``{{$HOME:}}`` like any other text.
    Names of many classes are written once, for all data sets.

    Args:
        cfg (Config): The config.
        path (str | Path): The file.
        expanded (Sequence[str]): Values that MMEngine is to expand all the same. Defaults to none.
    """
    content = plain_content(cfg)
    many = _take_many_classes(content)
    text = Config(content).pretty_text
    for name, metainfo in many.items():
        text = f'{name} = {pprint.pformat(metainfo, width=100, compact=True)}\n' + text.replace(
            repr(name), name)
    text = unexpanded(text)
    for value in expanded:
        text = text.replace(unexpanded(repr(value)), repr(value))
    Path(path).write_text(text, encoding='utf-8')


def _take_many_classes(content: dict) -> Dict[str, dict]:
    """Put names in the place of each metainfo with many classes; return what they stand for.

    MMEngine drops variables with such names when it reads the file.
    """
    taken: Dict[str, dict] = {}
    for part in list(nested_dicts(content)):
        metainfo = part.get('metainfo')
        if isinstance(metainfo, dict) and len(metainfo.get('classes') or ()) > MANY_CLASSES:
            known = (name for name, other in taken.items() if other == metainfo)
            part['metainfo'] = next(known, f'__metainfo_{len(taken) + 1}')
            taken[part['metainfo']] = metainfo
    return taken


def unexpanded(text: str) -> str:
    """Return Python code whose strings mean the same, but in which MMEngine expands nothing."""
    return text.replace('{{', '{\\x7b')  # outside of strings, code has no two of them in a row

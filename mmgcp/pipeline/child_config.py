# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Changing configs, and writing them as short children of others."""
import copy
from pathlib import Path
from typing import Callable, Dict

from mmengine.config import Config

from mmgcp.utils.cli import replacing
from mmgcp.utils.config_content import plain_content
from mmgcp.utils.config_text import unexpanded, write_config


def override(cfg: Config, settings: Dict[str, object]) -> Config:
    """Return a copy of a config with other settings.

    Args:
        cfg (Config): The config.
        settings (dict): Values by dotted key, as for MMEngine's ``Config.merge_from_dict``.

    Returns:
        Config: The changed copy.
    """
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(copy.deepcopy(settings))  # MMEngine removes ``_delete_`` from them
    return cfg


def write_child(path: Path, base: str, change: Callable[[Config], Config]) -> None:
    """Write a config that inherits from a base and holds only what differs.

    Args:
        path (Path): The file to write.
        base (str): The base, an absolute path, one relative to the folder of ``path``, or a
            config of a package as ``mmyolo::…``.
        change (Callable): Returns the whole config that the child should amount to, given the
            base as a child inherits it. It must not modify its argument, nor drop top-level
            settings.
    """
    with replacing(path) as (temporary, ):
        temporary.write_text(unexpanded(f'_base_ = {base!r}\n'), encoding='utf-8')
        inherited = Config.fromfile(temporary)
        changes = _difference(plain_content(inherited), plain_content(change(inherited)))
        write_config(Config(dict(_base_=base, **changes)), temporary)


def _difference(base: Dict[str, object], wanted: Dict[str, object]) -> Dict[str, object]:
    """Return the settings that turn ``base`` into ``wanted`` by MMEngine's rules of merging."""
    changes = {}
    for key, value in wanted.items():
        before = base.get(key)
        if key in base and before == value:
            continue
        if not isinstance(value, dict) or key not in base:
            changes[key] = value
        elif isinstance(before, dict) and set(before) <= set(value):
            changes[key] = _difference(before, value)
        else:
            changes[key] = dict(_delete_=True, **value)
    return changes

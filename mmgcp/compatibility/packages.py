# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""``mmgcp::`` in configs, as ``mmyolo::``."""
from functools import wraps
from pathlib import Path
from typing import Optional, Tuple

from mmengine.config import Config

PREFIX = 'mmgcp::'
PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = PACKAGE / '.mim'


def register_package() -> None:
    """Let ``_base_ = 'mmgcp::yolov4/...'`` name a config of this package once it is imported.

    MMEngine has a list of the packages that it looks into, finds none that are used in place
    (``pip install -e``), and builds what such a base has in the scope of its package. The configs
    of mmgcp are those of MMYOLO and MMDetection with a few classes of its own, which they name
    by ``mmgcp.``, so there the scope is left to ``default_scope``.
    """
    find_config = Config._get_cfg_path
    if hasattr(find_config, '__wrapped__'):
        return

    @wraps(find_config)
    def find(cfg_path: str, filename: str) -> Tuple[str, Optional[str]]:
        if cfg_path.startswith(PREFIX):
            return find_own_config(cfg_path), None
        return find_config(cfg_path, filename)

    Config._get_cfg_path = staticmethod(find)


def carried_folder() -> Path:
    """Return the folder with configs and tools: the checkout, or else what is installed."""
    is_checkout = (PACKAGE.parent / 'tools' / 'prune.py').is_file()
    return PACKAGE.parent if is_checkout else INSTALLED


def find_own_config(name: str) -> str:
    """Return the file of a config that is named ``mmgcp::...``, or raise a FileNotFoundError."""
    path = carried_folder() / 'configs' / name[len(PREFIX):]
    if not path.is_file():
        raise FileNotFoundError(f'file "{path}" does not exist')
    return str(path)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""``mmgcp::`` in configs: MMEngine has a list of the packages that it looks into."""
from functools import wraps
from typing import Optional, Tuple

from mmengine.config import Config, utils

PACKAGE = 'mmgcp'


def register_package() -> None:
    """Let ``_base_ = 'mmgcp::yolov4/...'`` name a config of this package once it is imported.

    MMEngine builds what such a base has in the scope of its package. The configs of mmgcp are
    those of MMYOLO and MMDetection with a few classes of its own, which they name by
    ``mmgcp.``, so there the scope is left to ``default_scope``.
    """
    if PACKAGE in utils.MODULE2PACKAGE:
        return
    utils.MODULE2PACKAGE[PACKAGE] = PACKAGE
    find_config = Config._get_cfg_path

    @wraps(find_config)
    def without_scope(cfg_path: str, filename: str) -> Tuple[str, Optional[str]]:
        path, scope = find_config(cfg_path, filename)
        return path, None if scope == PACKAGE else scope

    Config._get_cfg_path = staticmethod(without_scope)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .compatibility import allow_mmengine_checkpoints, check_versions, let_ssd_predict
from .version import __version__

check_versions()
allow_mmengine_checkpoints()
let_ssd_predict()

from . import datasets, distillation, engine, models, pruning  # noqa: E402,F401

__all__ = ['__version__']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from mmgcp.compatibility import allow_mmengine_checkpoints, check_versions, let_ssd_predict
from mmgcp.version import __version__

check_versions()
allow_mmengine_checkpoints()
let_ssd_predict()

from mmgcp import attention, datasets, distillation, models, sparsity  # noqa: E402,F401
from mmgcp.pruning import layerwise  # noqa: E402,F401

__all__ = ['__version__']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Model compression for OpenMMLab's detectors.

Importing this package registers its classes, which configs then name as ``type='mmgcp.X'``, and
its configs, ``_base_ = 'mmgcp::yolov4/...'``. It changes nothing else outside of mmgcp; see
:func:`mmgcp.compatibility.mend_openmmlab`.
"""
from mmgcp.compatibility import check_versions
from mmgcp.version import __version__

check_versions()

from mmgcp.compatibility.packages import register_package  # noqa: E402

register_package()

from mmgcp import attention, datasets, distillation, models, sparsity, spatial  # noqa: E402,F401
from mmgcp.pruning import layerwise  # noqa: E402,F401

__all__ = ['__version__']

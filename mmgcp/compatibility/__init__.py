# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Everything that depends on the versions of torch and of the OpenMMLab packages.

This package imports nothing of OpenMMLab when it is loaded: MMYOLO and MMDetection assert
the versions they support on import, and :func:`check_versions` has to report first.
"""
from .mending import mend_openmmlab
from .step_hooks import register_step_post_hook, register_step_pre_hook
from .versions import check_versions, version_number

__all__ = [
    'check_versions', 'mend_openmmlab', 'register_step_post_hook', 'register_step_pre_hook',
    'version_number'
]

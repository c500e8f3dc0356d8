# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Registries of this package: ``type='mmgcp.X'`` in a config names the class X.

They are children of MMEngine's root registries, beside MMDetection's and MMYOLO's,
so that the name resolves under either's ``default_scope``.
"""
from typing import Any, Optional

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import Registry

from mmgcp.compatibility import mend_openmmlab


class MendingRegistry(Registry):
    """A registry that calls :func:`mend_openmmlab` before its first class is used.

    A runner builds data sets, hooks and models before it loads a checkpoint or predicts, so
    both work with any config that uses a class of mmgcp, whichever tool runs it.
    """

    def get(self, key: str) -> Optional[Any]:
        """Return the class or function registered under a name, as MMEngine's registry does.

        Args:
            key (str): Name, with or without a scope.

        Returns:
            type | Callable, optional: What is registered; None if nothing is.
        """
        mend_openmmlab()
        return super().get(key)


DATASETS = MendingRegistry(
    'dataset', parent=MMENGINE_DATASETS, scope='mmgcp', locations=['mmgcp.datasets'])
HOOKS = MendingRegistry(
    'hook', parent=MMENGINE_HOOKS, scope='mmgcp', locations=['mmgcp.sparsity'])
MODELS = MendingRegistry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmgcp',
    locations=['mmgcp.models', 'mmgcp.distillation', 'mmgcp.pruning', 'mmgcp.attention'])
TASK_UTILS = MendingRegistry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    scope='mmgcp',
    locations=['mmgcp.models', 'mmgcp.sparsity', 'mmgcp.pruning', 'mmgcp.pruning.layerwise',
               'mmgcp.attention'])

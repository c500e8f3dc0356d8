# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Registries of this package: ``type='mmgcp.X'`` in a config finds X.

They are children of MMEngine's root registries, beside MMDetection's and MMYOLO's,
so that the name resolves under either's ``default_scope``.
"""
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import Registry

DATASETS = Registry(
    'dataset', parent=MMENGINE_DATASETS, scope='mmgcp', locations=['mmgcp.datasets'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmgcp', locations=['mmgcp.sparsity'])
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='mmgcp',
    locations=['mmgcp.models', 'mmgcp.distillation', 'mmgcp.pruning', 'mmgcp.attention'])
TASK_UTILS = Registry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    scope='mmgcp',
    locations=['mmgcp.models', 'mmgcp.sparsity', 'mmgcp.pruning', 'mmgcp.pruning.layerwise',
               'mmgcp.attention'])

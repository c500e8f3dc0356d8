# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Registries of this package: ``type='mmgcp.X'`` in a config names the class X.

They are children of MMEngine's root registries, beside MMDetection's and MMYOLO's,
so that the name resolves under either's ``default_scope``.
"""
from typing import Any, Callable, List, Optional, Type

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import TASK_UTILS as MMENGINE_TASK_UTILS
from mmengine.registry import Registry

from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import UserError, shown, told


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
    locations=['mmgcp.models', 'mmgcp.distillation', 'mmgcp.pruning', 'mmgcp.attention',
               'mmgcp.spatial'])
TASK_UTILS = MendingRegistry(
    'task util',
    parent=MMENGINE_TASK_UTILS,
    scope='mmgcp',
    locations=['mmgcp.models', 'mmgcp.sparsity', 'mmgcp.pruning', 'mmgcp.pruning.layerwise',
               'mmgcp.attention'])


def task_util_names(parent: type) -> List[str]:
    """List the names of all registered subclasses of a class, without the prefix ``mmgcp.``."""
    return sorted(name for name, kind in TASK_UTILS.module_dict.items()
                  if isinstance(kind, type) and issubclass(kind, parent))


def build_task_util(config: Any, parent: type, error: Type[UserError] = UserError) -> Any:
    """Build what a user's config names, with errors of one sentence.

    Args:
        config (dict): The config.
        parent (type): What its class has to be a subclass of; messages have its name.
        error (type): What to raise. Defaults to UserError.

    Returns:
        Any: An instance of a subclass of ``parent``.

    Raises:
        UserError: It is no config, or there is no such class, or it does not have an option.
    """
    return build_part(TASK_UTILS, config, parent.__name__.lower(),
                      lambda kind: isinstance(kind, type) and issubclass(kind, parent), error)


def build_part(registry: Registry, config: Any, what: str, fits: Callable[[Any], bool],
               error: Type[UserError] = UserError) -> Any:
    """Build what a user's config names in a registry, with errors of one sentence.

    Args:
        registry (Registry): The registry.
        config (dict): The config.
        what (str): What it should be, for messages.
        fits (Callable): Whether a registered class or function is one.
        error (type): What to raise. Defaults to UserError.

    Returns:
        Any: What was built.

    Raises:
        UserError: It is no config, there is no such class, or it cannot be built like this.
    """
    kind = config.get('type') if isinstance(config, dict) else None
    if not kind:
        raise error(f'a {what} must be a config with a type, but is {shown(config)}')
    found = _find(registry, kind, config.get('_scope_')) if isinstance(kind, str) else kind
    if found is None or not fits(found):
        names = sorted(name for name, item in registry.module_dict.items() if fits(item))
        raise error(f'there is no {what} {shown(kind)}; mmgcp has '
                    + ', '.join(f'mmgcp.{name}' for name in names))
    return build_model(registry, config, f'{what} {shown(kind)}', error)


def build_model(registry: Registry, config: dict, what: str,
                error: Type[UserError] = UserError) -> Any:
    """Build what a config names, such as a model or a part of one, with errors of one sentence.

    Args:
        registry (Registry): The registry.
        config (dict): The config.
        what (str): What it is, for messages.
        error (type): What to raise. Defaults to UserError.

    Returns:
        Any: The model.

    Raises:
        UserError: It cannot be built.
    """
    try:
        return registry.build(config)
    except UserError:
        raise
    except Exception as reason:  # the constructors of a detector's parts can raise anything
        raise error(f'the {what} cannot be built: {told(reason)}') from reason


def _find(registry: Registry, kind: str, scope: Optional[str]) -> Any:
    """Return what is registered under a name; None if nothing is."""
    try:
        return registry.get(f'{scope}.{kind}' if scope and '.' not in kind else kind)
    except Exception:  # MMEngine's for names with a scope that it does not know
        return None

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What depends on the versions of torch and of the OpenMMLab packages.

Nothing of OpenMMLab is imported at the top: MMYOLO and MMDetection assert their own
ranges when they are imported, and :func:`check_versions` has to speak first.
"""
import functools
import importlib
import pickle
import re
import types
from importlib import machinery, metadata, util
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np

# Package, lowest version, first version that is too new (None: none is).
# The order matters: a package may only be imported after those it imports.
SUPPORTED_VERSIONS = (
    ('torch', '1.13', None),
    ('mmengine', '0.7.1', '1.0.0'),
    ('mmcv', '2.0.0', '2.1.0'),
    ('mmdet', '3.0.0', '4.0.0'),
    ('mmyolo', '0.5.0', '1.0.0'),
)


def check_versions() -> None:
    """Raise an ImportError if a package is missing or of an unsupported version."""
    for name, lowest, too_new in SUPPORTED_VERSIONS:
        wanted = f'{name}>={lowest}' + (f',<{too_new}' if too_new else '')
        found = _installed_version(name)
        if found is None:
            raise ImportError(_describe_missing(name, wanted))
        number = _version_number(found)
        too_old = number < _version_number(lowest)
        if too_old or (too_new and number >= _version_number(too_new)):
            raise ImportError(f'mmgcp needs {wanted}, but {name} {found} is installed.')
        if name == 'mmcv' and not _has_mmcv_ops():
            raise ImportError(f'mmgcp needs the compiled ops of {wanted}, but the installed '
                              f'mmcv {found} has none (mmcv._ext is missing).')


def _installed_version(name: str) -> Optional[str]:
    """The version in the package's metadata, else its ``__version__``, else None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
    if util.find_spec(name) is None or (name == 'mmcv' and _mmcv_lite_version()):
        return None
    return getattr(importlib.import_module(name), '__version__', None)


def _mmcv_lite_version() -> Optional[str]:
    try:
        return metadata.version('mmcv-lite')
    except metadata.PackageNotFoundError:
        return None


def _describe_missing(name: str, wanted: str) -> str:
    lite = _mmcv_lite_version() if name == 'mmcv' else None
    if lite:
        return f'mmgcp needs the compiled ops of {wanted}, but mmcv-lite {lite} has none.'
    return f'mmgcp needs {wanted}, but {name} is not installed.'


def _has_mmcv_ops() -> bool:
    """Look for the extension module without importing mmcv."""
    spec = util.find_spec('mmcv')
    if spec is None or spec.submodule_search_locations is None:
        return False
    return machinery.PathFinder.find_spec('_ext', spec.submodule_search_locations) is not None


def _version_number(version: str) -> Tuple[int, int, int]:
    """``'2.13.0+cpu'`` -> ``(2, 13, 0)``; suffixes such as ``rc1`` do not count."""
    match = re.match(r'(\d+)(?:\.(\d+))?(?:\.(\d+))?', version)
    if match is None:
        raise ImportError(f'mmgcp cannot read the version {version!r}.')
    return tuple(int(part or 0) for part in match.groups())


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read MMEngine's own checkpoints under torch >= 2.6.

    There ``weights_only=True`` is the default, and what MMEngine's message hub leaves in a
    checkpoint is refused. The few globals it needs are registered as safe; loading remains
    ``weights_only``, so a pickle that calls anything else is still refused.
    """
    import torch
    if _version_number(torch.__version__) >= (2, 6, 0):
        torch.serialization.add_safe_globals(_checkpoint_globals())


def _checkpoint_globals() -> List[Tuple[Any, str]]:
    pairs = [
        (_checkpoint_getattr, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    for owner in _pickled_functions():
        pairs.append((owner, f'{owner.__module__}.{owner.__name__}'))
    # numpy 2 renamed the module, and either may have written the checkpoint.
    for function in (np.ndarray(0).__reduce__()[0], np.float64(0).__reduce__()[0]):
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            pairs.append((function, f'{module}.{function.__name__}'))
    # Without the class of object arrays, those stay refused.
    for code in np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?SU':
        dtype_class = type(np.dtype(code))
        pairs.append((dtype_class, f'{dtype_class.__module__}.{dtype_class.__name__}'))
    return pairs


def _pickled_functions() -> Dict[type, Tuple[str, ...]]:
    """MMEngine's classes with the functions of theirs that its checkpoints contain."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
    return {
        HistoryBuffer: ('min', 'max', 'current', 'mean'),
        OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
    }


def _checkpoint_getattr(owner: Any, name: str) -> Callable:
    """Stand in for ``getattr``, by which pickle names a function of a class."""
    for known, names in _pickled_functions().items():
        if owner is known and name in names:
            return getattr(owner, name)
    raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint.')


def let_ssd_predict() -> None:
    """Let SSD heads predict under MMDetection 3.2 and 3.3.

    There the ``loss_cls`` of every dense head is looked at for predictions, but SSDHead has
    none (https://github.com/open-mmlab/mmdetection/issues/11780), so that no SSD can be tested.
    """
    from mmdet.models.dense_heads import SSDHead
    if not hasattr(SSDHead, 'loss_cls'):
        SSDHead.loss_cls = None


def register_step_pre_hook(optimizer: Any, function: Callable[[Any], None]) -> Any:
    """Call ``function(optimizer)`` before each step that the optimizer makes.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        function (Callable): It may change gradients in place.

    Returns:
        A handle whose ``remove()`` takes the hook away.
    """
    if not hasattr(optimizer, 'register_step_pre_hook'):
        return _StepPreHook(optimizer, function)

    def hook(optimizer, args, kwargs):
        function(optimizer)  # torch would take what it returns for new arguments

    return optimizer.register_step_pre_hook(hook)


def register_step_post_hook(optimizer: Any, function: Callable[[Any], None]) -> Any:
    """Call ``function(optimizer)`` after each step that the optimizer makes.

    Args:
        optimizer (torch.optim.Optimizer): The optimizer.
        function (Callable): It may change parameters in place.

    Returns:
        A handle whose ``remove()`` takes the hook away.
    """
    if not hasattr(optimizer, 'register_step_post_hook'):
        return _StepPostHook(optimizer, function)
    return optimizer.register_step_post_hook(
        lambda optimizer, args, kwargs: function(optimizer))


class _StepPreHook:
    """The same for torch 1.13, whose optimizers have no step hooks."""

    def __init__(self, optimizer: Any, function: Callable[[Any], None]) -> None:
        self.function = function
        self.optimizer = optimizer
        self.original_step = optimizer.step
        # MMEngine's schedulers leave a mark on `step` and look for it later:
        # `wraps` copies it. They also expect a bound method.
        self.step = types.MethodType(self._wrap(optimizer.step), optimizer)
        optimizer.step = self.step

    def _wrap(self, step: Callable) -> Callable:

        @functools.wraps(step)
        def hooked_step(optimizer, *args, **kwargs):
            if 'grad_scaler' in kwargs:
                raise RuntimeError('A fused optimizer under AMP needs torch>=2.0 here.')
            return self._run(step, args, kwargs)

        return hooked_step

    def _run(self, step: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        if self.function is not None:
            self.function(self.optimizer)
        return step(*args, **kwargs)

    def remove(self) -> None:
        """Take the hook away; when ``step`` was wrapped again since, only silence it."""
        self.function = None
        if self.optimizer.step is self.step:
            self.optimizer.step = self.original_step


class _StepPostHook(_StepPreHook):

    def _run(self, step: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        result = step(*args, **kwargs)
        if self.function is not None:
            self.function(self.optimizer)
        return result

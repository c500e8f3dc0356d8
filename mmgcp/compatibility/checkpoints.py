# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Loading MMEngine's checkpoints with torch >= 2.6."""
import pickle
from typing import Any, Callable, Dict, List, Tuple

import numpy as np

from .versions import version_number


def allow_mmengine_checkpoints() -> bool:
    """Let ``torch.load`` read MMEngine's own checkpoints with torch >= 2.6.

    Since torch 2.6 ``weights_only=True`` is the default, and the contents of MMEngine's
    message hub, which are part of its checkpoints, are refused. This registers the few
    globals that they need as safe. Loading remains ``weights_only``: a pickle that calls
    anything else is still refused.

    Returns:
        bool: Whether torch was changed; older versions need no change.
    """
    import torch
    if version_number(torch.__version__) < (2, 6, 0):
        return False
    torch.serialization.add_safe_globals([*checkpoint_globals()])
    return True


def checkpoint_getattr(owner: Any, name: str) -> Callable:
    """Replace ``getattr``, by which a pickle refers to a function of a class.

    Args:
        owner (Any): The class.
        name (str): Name of the function.

    Returns:
        Callable: The function.

    Raises:
        pickle.UnpicklingError: It is none of those that MMEngine's checkpoints contain.
    """
    for known, names in _pickled_functions().items():
        if owner is known and name in names:
            return getattr(owner, name)
    raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed in a checkpoint.')


def checkpoint_globals() -> List[Tuple[Any, str]]:
    """List what MMEngine's checkpoints need, each with its name in the pickle."""
    pairs = [
        (checkpoint_getattr, 'builtins.getattr'),
        (np.ndarray, 'numpy.ndarray'),
        (np.dtype, 'numpy.dtype'),
    ]
    for owner in _pickled_functions():
        pairs.append((owner, f'{owner.__module__}.{owner.__name__}'))
    # numpy 2 renamed the module; the checkpoint may have been written with either version.
    for function in (np.ndarray(0).__reduce__()[0], np.float64(0).__reduce__()[0]):
        for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
            pairs.append((function, f'{module}.{function.__name__}'))
    # The dtype of object arrays is left out: these arrays stay refused.
    for code in np.typecodes['AllInteger'] + np.typecodes['AllFloat'] + '?SU':
        dtype_class = type(np.dtype(code))
        pairs.append((dtype_class, f'{dtype_class.__module__}.{dtype_class.__name__}'))
    return pairs


def _pickled_functions() -> Dict[type, Tuple[str, ...]]:
    """Return MMEngine's classes, each with those of its functions that checkpoints contain."""
    from mmengine.logging.history_buffer import HistoryBuffer
    from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
    return {
        HistoryBuffer: ('min', 'max', 'current', 'mean'),
        OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
    }

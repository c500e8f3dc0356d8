# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Loading checkpoints whose weights must all fit the model."""
import os.path as osp
from typing import Any, Dict, List

import torch.nn as nn
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import UserError

PARALLEL_PREFIX = 'module.'  # of the names in checkpoints of DistributedDataParallel


def load_strictly(model: nn.Module, path: str, model_name: str = 'the config') -> dict:
    """Load the weights of a checkpoint, all of which must fit the model.

    Args:
        model (nn.Module): The model, changed in place.
        path (str): File or URL of the checkpoint.
        model_name (str): Where the model comes from, for the error message.
            Defaults to 'the config'.

    Returns:
        dict: The ``meta`` of the checkpoint.

    Raises:
        UserError: There is no such checkpoint, it cannot be read, or it does not fit the
            model, which has not been changed then.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get('state_dict', checkpoint)
    if not _has_weights(state):
        raise UserError(f'the checkpoint {path} holds no weights by name')
    state = {_plain_name(key): value for key, value in state.items()}
    wrong = _compare(state, model.state_dict())
    if any(wrong.values()):
        described = '; '.join(_describe_keys(kind, keys) for kind, keys in wrong.items() if keys)
        raise UserError(f'the checkpoint {path} does not fit {model_name}: {described}')
    model.load_state_dict(state, strict=False)
    return checkpoint.get('meta', {})


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint to the CPU.

    Args:
        path (str): File or URL of the checkpoint.

    Returns:
        dict: Its contents.

    Raises:
        UserError: There is no such file, or it is no checkpoint.
    """
    mend_openmmlab()
    if '://' not in path and not osp.isfile(path):
        raise UserError(f'there is no checkpoint {path}')
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except Exception as error:  # pickle, zipfile and torch raise errors of many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f'{path} cannot be read as a checkpoint: {reason}') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} is no checkpoint but a {type(checkpoint).__name__}')
    return checkpoint


def _has_weights(state: Any) -> bool:
    return isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())


def _plain_name(key: str) -> str:
    return key[len(PARALLEL_PREFIX):] if key.startswith(PARALLEL_PREFIX) else key


def _compare(state: Dict[str, Tensor], expected: Dict[str, Tensor]) -> Dict[str, List[str]]:
    """List the weights that do not fit, by kind; counters of BatchNorm may be missing."""
    return dict(
        missing=[key for key in expected
                 if key not in state and not key.endswith('num_batches_tracked')],
        unexpected=[key for key in state if key not in expected],
        mismatched=[key for key in expected
                    if key in state and state[key].shape != expected[key].shape])


def _describe_keys(kind: str, keys: List[str]) -> str:
    more = ', ...' if len(keys) > 3 else ''
    return f'{len(keys)} {kind} ({", ".join(keys[:3])}{more})'

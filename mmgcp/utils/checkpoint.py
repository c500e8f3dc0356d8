# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Loading checkpoints whose weights must all fit the model."""
import os.path as osp
from typing import Any, Dict, List

import torch
import torch.nn as nn
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import UserError

from .finite import describe_not_finite

PARALLEL_PREFIX = 'module.'  # of the names in checkpoints of DistributedDataParallel
MASKS_PREFIX = 'spatial_masks.'  # of what mmgcp.SpatialPruner adds to a detector


def load_strictly(model: nn.Module, path: str, model_name: str = 'the config') -> dict:
    """Load the weights of a checkpoint, all of which must fit the model.

    The mask convolutions of :class:`mmgcp.SpatialPruner` alone may be missing, or be in the
    checkpoint and not in the model; this is printed.

    Args:
        model (nn.Module): The model, changed in place.
        path (str): File or URL of the checkpoint.
        model_name (str): Where the model comes from, for the error message.
            Defaults to 'the config'.

    Returns:
        dict: The ``meta`` of the checkpoint; its ``dataset_meta``, if any, is a dictionary.

    Raises:
        UserError: There is no such checkpoint, it cannot be read, it does not fit the model, or
            the model would not compute finite numbers with it. The model has not been changed then.
    """
    checkpoint = read_checkpoint(path)
    meta = _read_meta(checkpoint, path)
    state = checkpoint.get('state_dict', checkpoint)
    _check_weights(state, path)
    state = {_plain_name(key): value for key, value in state.items()}
    wrong = _compare(state, model.state_dict())
    lines = _leave_masks_out(wrong, path, model_name)
    if any(wrong.values()):
        described = '; '.join(_describe_keys(kind, keys) for kind, keys in wrong.items() if keys)
        raise UserError(f'the checkpoint {path} does not fit {model_name}: {described}')
    not_finite = describe_not_finite(model, state)
    if not_finite:
        raise UserError(f'the checkpoint {path} cannot be used: {not_finite}')
    for line in lines:
        print(line)
    model.load_state_dict(state, strict=False)
    return meta


def read_checkpoint(path: str) -> dict:
    """Read a checkpoint to the CPU, without running code that it may contain.

    Args:
        path (str): File of the checkpoint, or its address in one of MMEngine's schemes, such as
            ``https://`` or ``openmmlab://``.

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
    except OSError as error:
        raise UserError(f'{path} cannot be read as a checkpoint: {error}') from error
    if not isinstance(checkpoint, dict):
        raise UserError(f'{path} is no checkpoint but a {type(checkpoint).__name__}')
    return checkpoint


def _read_meta(checkpoint: dict, path: str) -> dict:
    """Return what a checkpoint says about itself, where None and nothing are the same."""
    meta = checkpoint.get('meta')
    meta = {} if meta is None else meta
    dataset_meta = meta.get('dataset_meta') if isinstance(meta, dict) else None
    for name, value in (('meta', meta), ('dataset_meta', {} if dataset_meta is None
                                         else dataset_meta)):
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise UserError(f'{name} of the checkpoint {path} must be a dictionary with names as '
                            f'its keys, but is {str(value)[:60]!r}')
    if 'dataset_meta' in meta and dataset_meta is None:
        meta = {key: value for key, value in meta.items() if key != 'dataset_meta'}
    return meta


def _check_weights(state: Any, path: str) -> None:
    """Raise a UserError unless these are ordinary tensors by name."""
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()):
        raise UserError(f'the checkpoint {path} holds no weights by name')
    for key, value in state.items():
        kind = ('without values (on the device meta)' if value.device.type == 'meta' else
                'quantized' if value.is_quantized else
                'complex' if value.is_complex() else
                '' if value.layout is torch.strided else 'sparse')
        if kind:
            raise UserError(f'the checkpoint {path} cannot be used: {key} is {kind}, but weights '
                            'are ordinary tensors')


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


def _leave_masks_out(wrong: Dict[str, List[str]], path: str, model_name: str) -> List[str]:
    """Drop mask convolutions from what is missing and unexpected, in place; say which were."""
    texts = dict(missing='are not in {path}: they are not trained, and keep nearly all cells',
                 unexpected='of {path} are not used: {model} does not prune what they decide')
    lines = []
    for kind, text in texts.items():
        masks = [key for key in wrong[kind] if key.startswith(MASKS_PREFIX)]
        if masks:
            wrong[kind] = [key for key in wrong[kind] if key not in masks]
            names = ', '.join(dict.fromkeys(key.rpartition('.')[0] for key in masks))
            lines.append(f'the mask convolutions {names} '
                         + text.format(path=path, model=model_name))
    return lines


def _describe_keys(kind: str, keys: List[str]) -> str:
    more = ', ...' if len(keys) > 3 else ''
    return f'{len(keys)} {kind} ({", ".join(keys[:3])}{more})'


def describe_misfit(model: nn.Module, checkpoint: dict, path: str) -> str:
    """Describe which weights of a checkpoint do not fit a model that it is to be trained from.

    Args:
        model (nn.Module): The model.
        checkpoint (dict): What :func:`read_checkpoint` returned.
        path (str): Its file or URL, for messages.

    Returns:
        str: Some lines; empty if all fit.

    Raises:
        UserError: None fits.
    """
    state = checkpoint.get('state_dict', checkpoint)
    state = {_plain_name(key): value for key, value in state.items()
             if isinstance(key, str) and isinstance(value, Tensor)
             } if isinstance(state, dict) else {}
    expected = model.state_dict()
    wrong = _compare(state, expected)
    fitting = [key for key in expected if key in state and state[key].shape == expected[key].shape]
    if not fitting:
        raise UserError(f'none of the weights of {path} fits the model of the config, which has '
                        f'{len(expected)}: is it a checkpoint of this architecture?')
    if not any(wrong.values()):
        return ''
    lines = [f'{path} does not fit the model of the config: training starts from '
             f'{len(fitting)} of {len(expected)} weights, the others are not trained yet',
             *(f'  {_describe_keys(kind, keys)}' for kind, keys in wrong.items() if keys)]
    return '\n'.join(lines)

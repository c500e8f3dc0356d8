# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reading configs and building the detectors they describe."""
import copy
import os.path as osp
from typing import Any, Iterator, List, Optional, Tuple

import mmengine
import torch.nn as nn
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from mmgcp.compatibility import mend_openmmlab
from mmgcp.compatibility.packages import PREFIX, find_own_config
from mmgcp.errors import UserError, told

from .checks import MAPPING, check_value
from .config_content import plain_content, type_name
from .process_state import alone


def load_config(path: str, cfg_options: Optional[dict] = None) -> Config:
    """Read a config.

    Args:
        path (str): A file, or a config inside a package as ``mmyolo::yolov8/….py``.
        cfg_options (dict, optional): Settings to override, by their dotted names.
            Defaults to None.

    Returns:
        Config: The config.

    Raises:
        UserError: There is no such config, it cannot be read, an option does not fit it, or
            it describes no model.
    """
    try:
        cfg = _read(path)
    except FileNotFoundError as error:
        raise UserError(f'there is no config {error}' if str(error) == path else
                        f'the config {path} needs a file that does not exist: {error}') from None
    except Exception as error:  # a config is Python code, which can raise anything
        hint = ''
        if getattr(error, 'name', None) == 'pkg_resources':
            hint = " (MMEngine needs it for such configs: pip install 'setuptools<80')"
        raise UserError(f'the config {path} cannot be read: {told(error)}{hint}') from error
    _override(cfg, cfg_options or {}, path)
    if 'model' not in cfg:
        raise UserError(f'the config {path} describes no model')
    return _with_plain_types(cfg)


def _with_plain_types(cfg: Config) -> Config:
    """Return a config whose types are names, as those of a new-style config are classes."""
    if all(isinstance(part.get('type', ''), str) for part in nested_dicts(cfg._cfg_dict)):
        return cfg
    return Config(plain_content(cfg), filename=cfg.filename)


def _read(path: str) -> Config:
    if path.startswith(PREFIX):
        path = find_own_config(path)
    if '::' in path:
        from mmengine.hub import get_config
        return get_config(path)
    if osp.isfile(path):
        return Config.fromfile(path)
    raise FileNotFoundError(path)


def _override(cfg: Config, cfg_options: dict, path: str) -> None:
    """Merge options into a config, in place."""
    try:
        cfg.merge_from_dict(cfg_options)
    except Exception as error:  # whatever MMEngine meets on the way to a key
        given = ' '.join(f'{key}={value}' for key, value in cfg_options.items())
        reason = ' '.join(str(error.args[0] if error.args else error).split())
        raise UserError(f'the options {given} do not fit the config {path}: {reason}') from error


def build_detector(cfg: Config) -> nn.Module:
    """Build the detector of a config, with BatchNorm in place of SyncBatchNorm.

    It is the same in each process of a distributed run, and the same as without one.

    Args:
        cfg (Config): A complete config with ``model`` and ``default_scope``.

    Returns:
        nn.Module: The detector in train mode; ``init_weights()`` has not been called.

    Raises:
        UserError: The model cannot be built.
    """
    mend_openmmlab()
    try:
        with alone(), DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmyolo')):
            return revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
    except UserError as error:
        raise UserError(f'the model of the config cannot be built: {error}') from error
    except Exception as error:  # the constructors of a detector's parts can raise anything
        raise UserError(f'the model of the config cannot be built: {told(error)}') from error


def image_size(cfg: Config) -> Tuple[int, int]:
    """Find the size of the images that a detector is tested on.

    Args:
        cfg (Config): A complete config.

    Returns:
        tuple[int, int]: Width and height in pixels, see :func:`image_size_said`; 640 and 640 if
        the config does not say them.
    """
    return image_size_said(cfg) or (640, 640)


def image_size_said(cfg: Config) -> Optional[Tuple[int, int]]:
    """Find the size of the images to test on that a config says.

    Args:
        cfg (Config): A complete config.

    Returns:
        tuple[int, int], optional: Width and height in pixels: what the last transform of the
        test pipeline that says a size makes, else the config's ``img_scale``; None without any.
    """
    sizes = [_size_made_by(step) for step in reversed(_test_pipeline(cfg))]
    return next(filter(None, [*sizes, _pair(cfg.get('img_scale'))]), None)


def _test_pipeline(cfg: Config) -> List[dict]:
    """The steps of the pipeline of the images to test on, also in a wrapper of data sets."""
    dataset = section(cfg, 'test_dataloader').get('dataset') or {}
    steps: Any = next(
        (part['pipeline'] for part in nested_dicts(dataset) if part.get('pipeline')), [])
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _size_made_by(step: dict) -> Optional[Tuple[int, int]]:
    """The width and height of what a transform makes; None if its config does not say them."""
    kind = str(step.get('type'))
    if kind.endswith('Pad') and _pair(step.get('size')):
        return _pair(step['size'])
    if 'Resize' in kind:
        return _pair(step.get('scale')) or _pair((step.get('width'), step.get('height')))
    return None


def _pair(scale: Any) -> Optional[Tuple[int, int]]:
    """Two integers, or one that stands for two."""
    if isinstance(scale, int):
        return scale, scale
    if isinstance(scale, (list, tuple)) and len(scale) == 2 and all(
            isinstance(side, int) for side in scale):
        return tuple(scale)
    return None


def replace_scale(content: Any, old: Tuple[int, int], new: Tuple[int, int]) -> Any:
    """Replace the size of the images, and its negative half, everywhere in a part of a config.

    Transforms of Albumentations, which is an optional package, are dropped.

    Args:
        content (Any): A data set, a pipeline or anything else, which is not changed.
        old (tuple[int, int]): Width and height in pixels.
        new (tuple[int, int]): Width and height in pixels instead.

    Returns:
        Any: The new content, of plain dictionaries.
    """
    if isinstance(content, dict):
        content = {key: replace_scale(item, old, new) for key, item in content.items()}
        if (content.get('width'), content.get('height')) == tuple(old):
            content.update(width=new[0], height=new[1])
        return content
    if isinstance(content, (list, tuple)):
        if list(content) == [old[0], old[1]]:
            return new
        if list(content) == [-old[0] // 2, -old[1] // 2]:
            return -new[0] // 2, -new[1] // 2
        return type(content)(
            replace_scale(item, old, new) for item in content
            if not (isinstance(item, dict) and item.get('type') == 'mmdet.Albu'))
    return content


def at_width(cfg: Config, width: int) -> Config:
    """Return a config that tests and validates on images of another size.

    Args:
        cfg (Config): A complete config, which is not changed.
        width (int): Width in pixels; the height changes as much, up to multiples of 32.

    Returns:
        Config: The new config, in which all validation images have one size.

    Raises:
        UserError: The config does not say the size of its images.
    """
    old = image_size(cfg)
    new = width, max(32, round(old[1] * width / old[0] / 32) * 32)
    cfg = with_fixed_size(cfg)
    for name in ('val_dataloader', 'test_dataloader'):
        if cfg.get(name):
            cfg[name] = dict(cfg[name], dataset=replace_scale(
                plain_content(cfg[name]['dataset']), old, new))
    if image_size(cfg) != new:
        raise UserError(f'the images cannot be made {width} pixels wide: the test pipeline does '
                        f'not say that they are {old[0]}')
    return cfg


def with_fixed_size(cfg: Config) -> Config:
    """Copy a config without what lets batches of validation images have sizes of their own."""
    cfg = copy.deepcopy(cfg)
    for part in nested_dicts((cfg.get('val_dataloader') or {}).get('dataset') or {}):
        if part.get('batch_shapes_cfg') is not None:
            part['batch_shapes_cfg'] = None
    return cfg


def drop_collate_scope(loader: dict) -> None:
    """Remove the scope from the config of a data loader's collate function, in place.

    MMEngine adds a scope when a config inherits the function from a config inside a package;
    version 0.10.7 would then pass it to the function as an argument.

    Args:
        loader (dict): Config of the data loader.
    """
    if isinstance(loader.get('collate_fn'), dict):
        loader['collate_fn'].pop('_scope_', None)


def drop_pretrained(content: dict) -> None:
    """Remove initialisations from checkpoints from any part of a config, in place."""
    for part in nested_dicts(content):
        given = part.get('init_cfg')
        if isinstance(given, dict) and _is_pretrained(given):
            del part['init_cfg']
        elif isinstance(given, (list, tuple)):
            part['init_cfg'] = [item for item in given if not _is_pretrained(item)]
        if part.get('pretrained') and isinstance(part['pretrained'], (str, bool)):
            part['pretrained'] = None if isinstance(part['pretrained'], str) else False


def _is_pretrained(init_cfg: dict) -> bool:
    """Whether weights are initialised from a checkpoint; the type may be a class or its path."""
    return type_name(init_cfg.get('type')) in ('Pretrained', 'PretrainedInit')


def nested_dicts(content: Any) -> Iterator[dict]:
    """Yield all dictionaries in a part of a config, the outer ones first."""
    if isinstance(content, dict):
        yield content
        content = list(content.values())
    if isinstance(content, (list, tuple)):
        for value in content:
            yield from nested_dicts(value)


def section(cfg: Config, name: str) -> dict:
    """Return a part of a config that is a dictionary; an empty one if it is missing or None.

    Args:
        cfg (Config): The config.
        name (str): Name of the part, such as ``'optim_wrapper'``.

    Returns:
        dict: The part.

    Raises:
        UserError: It is anything else.
    """
    found = cfg.get(name)
    check_value(f'{name} of the config', {} if found is None else found, MAPPING)
    return found or {}


def check_layout() -> None:
    """Check that the installed yapf lays out configs, which MMEngine does before writing them.

    Raises:
        UserError: It does not.
    """
    try:
        Config(dict(checked=True)).pretty_text  # noqa: B018  a property that runs yapf
    except Exception as error:  # such as for an argument that yapf no longer has
        reason = error.__context__ or error  # newer versions of MMEngine blame the config
        raise UserError(
            f'MMEngine {mmengine.__version__} cannot write configs with the installed yapf '
            f"({reason}): pip install 'yapf<0.40.2'") from error

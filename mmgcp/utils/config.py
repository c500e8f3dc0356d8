# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reading configs and building the detectors they describe."""
import copy
import os.path as osp
from typing import Optional, Tuple

import torch.nn as nn
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from mmgcp.errors import UserError


def load_config(path: str, cfg_options: Optional[dict] = None) -> Config:
    """Read a config.

    Args:
        path (str): A file, or a config inside a package as ``mmyolo::yolov8/….py``.
        cfg_options (dict, optional): Settings to override. Defaults to None.

    Returns:
        Config: The config.

    Raises:
        UserError: There is no such config, or it has no model.
    """
    try:
        if '::' in path:
            from mmengine.hub import get_config
            cfg = get_config(path)
        elif osp.isfile(path):
            cfg = Config.fromfile(path)
        else:
            raise FileNotFoundError(path)
    except FileNotFoundError as error:
        raise UserError(f'there is no config {error}' if str(error) == path else
                        f'the config {path} needs a file that does not exist: {error}') from None
    except Exception as error:  # a config is Python, in which anything can go wrong
        hint = ''
        if getattr(error, 'name', None) == 'pkg_resources':
            hint = " (MMEngine needs it for such configs: pip install 'setuptools<80')"
        raise UserError(f'the config {path} cannot be read: '
                        f'{type(error).__name__}: {error}{hint}') from error
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    if 'model' not in cfg:
        raise UserError(f'the config {path} describes no model')
    return cfg


def build_detector(cfg: Config) -> nn.Module:
    """Build the detector of a config, with plain instead of synchronised BatchNorm.

    Args:
        cfg (Config): A whole config with ``model`` and ``default_scope``.

    Returns:
        nn.Module: The detector, not initialised, in train mode.

    Raises:
        UserError: The model cannot be built.
    """
    try:
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmyolo')):
            return revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
    except Exception as error:  # the constructors of a detector's parts can raise anything
        raise UserError('the model of the config cannot be built: '
                        f'{type(error).__name__}: {error}') from error


def image_size(cfg: Config) -> Tuple[int, int]:
    """Find the size of the images that a detector is tested on.

    Args:
        cfg (Config): A whole config.

    Returns:
        tuple[int, int]: Width and height in pixels: the config's ``img_scale``, else the
        scale of the resizing in the test pipeline, else 640 and 640.
    """
    scales = [cfg.get('img_scale')]
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    scales += [step.get('scale') for step in dataset.get('pipeline') or []]
    for scale in scales:
        if isinstance(scale, int):
            return scale, scale
        if isinstance(scale, (list, tuple)) and len(scale) == 2 and all(
                isinstance(side, int) for side in scale):
            return tuple(scale)
    return 640, 640


def drop_collate_scope(loader: dict) -> None:
    """Drop the scope of a data loader's collate function from its config, in place.

    Configs that inherit the function of a package have one; MMEngine 0.10.7 would pass it on
    to the function.

    Args:
        loader (dict): Config of the data loader.
    """
    if isinstance(loader.get('collate_fn'), dict):
        loader['collate_fn'].pop('_scope_', None)

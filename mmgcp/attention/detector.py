# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors that are trained with attention, and their configs."""
from typing import Any, Optional

import torch
import torch.nn as nn
from mmengine.config import Config

from mmgcp.errors import PruningError
from mmgcp.nn.forward import IMAGE_SHAPE
from mmgcp.nn.layers import find_layer, num_channels
from mmgcp.registry import MODELS, build_model
from mmgcp.utils.checks import (
    INPUT_SHAPE,
    MAPPING,
    NAME,
    PATTERNS,
    TYPE,
    check_keys,
    check_value,
    checked,
    either,
)
from mmgcp.utils.config_content import plain_content, type_name

from .blocks import PRUNABLE, find_blocks
from .inserted import InsertedAttention
from .modules import INITIAL_SCALE, NUM_GROUPS

SETTINGS = dict(
    modules=either(NAME, PATTERNS, text="must be 'prunable' or a list of patterns"),
    num_groups=NUM_GROUPS, initial_scale=INITIAL_SCALE, input_shape=INPUT_SHAPE)


@MODELS.register_module()
@checked(PruningError, detector_type=TYPE, attention=MAPPING)
def SCADetector(detector_type: str, attention: Optional[dict] = None,  # noqa: N802
                **kwargs: Any) -> nn.Module:
    """Build a detector with spatial and channel attention (SCA).

    It is to be trained and then pruned with :class:`mmgcp.attention.CPSCA` (`arXiv 2011.03891
    <https://arxiv.org/abs/2011.03891>`_).

    .. code-block:: python

        _base_ = 'any_detector.py'
        custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)
        model = dict(type='mmgcp.SCADetector', detector_type=_base_.model.type)
        prune_cfg = dict(criterion=dict(type='mmgcp.CPSCA'), target_params=0.5)

    A :class:`mmgcp.attention.SCAModule` follows each convolution whose channels pruning could
    remove, after its normalisation and activation, in training and in testing. This is a
    function that the registry calls like a class. The result has the class of the plain
    detector and all its modules under their own names, and beside them ``sca``, which is
    trained, averaged and saved with the rest. Training can start from a checkpoint of the plain
    detector, and ``tools/prune.py`` returns a plain detector.

    Outside of a ConvModule or RepVGGBlock, the attention comes directly behind the
    normalisation that reads the convolution, before the activation. Depthwise convolutions and
    layers that emit 1x1 maps, such as squeeze-excitation, get none.

    Args:
        detector_type (str): Type of the detector, for example ``'YOLODetector'`` or
            ``'mmgcp.PrunedDetector'``.
        attention (dict, optional): Settings: ``modules``, the layers to put attention behind,
            as patterns like those of a layer group or 'prunable' for all (the default);
            ``num_groups`` and ``initial_scale``, see :class:`mmgcp.attention.SCAModule`; and
            ``input_shape``, the shape (C, H, W) in pixels of an image to trace the model with.
        **kwargs: The arguments of the detector.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: A setting is unknown or not allowed, the model cannot be traced,
            Torch-Pruning is not installed, or there is nothing to put attention behind.
    """
    settings = dict(attention or {})
    check_keys(settings, list(SETTINGS), 'attention', PruningError)
    for name, value in settings.items():
        check_value(f'{name} of the attention', value, SETTINGS[name], PruningError)
    model = build_model(MODELS, dict(type=detector_type, **kwargs),
                        f'detector_type {detector_type!r}', PruningError)
    modules = settings.pop('modules', PRUNABLE)
    shape = settings.pop('input_shape', IMAGE_SHAPE)
    with torch.random.fork_rng(devices=[]):  # tracing must not change the weights drawn later
        producers = find_blocks(model, modules, shape)
    channels = {block: num_channels(find_layer(model, layer), 'out')
                for block, layer in producers.items()}
    InsertedAttention(producers, channels, **settings).insert(model)
    return model


def plain_config(cfg: Config) -> Config:
    """Return the config of a detector without the attention that it is trained with.

    Args:
        cfg (Config): A complete config.

    Returns:
        Config: A new one whose ``model`` is the plain detector; the given one if it is that of a
        detector without attention.
    """
    if type_name(cfg.model['type']) != 'SCADetector':
        return cfg
    content = plain_content(cfg)
    model = {key: value for key, value in content['model'].items()
             if key not in ('detector_type', 'attention')}
    return Config(dict(content, model=dict(model, type=content['model']['detector_type'])))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors whose finest levels are computed only where small objects may be."""
import inspect
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmyolo.models.necks import BaseYOLONeck
from torch import Tensor

from mmgcp.errors import PruningError, told
from mmgcp.models.necks import FinerLevel
from mmgcp.nn.hooks import hooked
from mmgcp.nn.temporarily import eval_mode
from mmgcp.registry import MODELS, build_model
from mmgcp.utils.checks import MAPPING, TYPE, checked

from .inference import ATTRIBUTE, SpatialInference
from .level_layers import LevelLayers
from .masks import SpatialMasks
from .settings import pruned_levels, read_settings

SIDE = 4  # cells of the coarsest level of the image whose maps are looked at


@MODELS.register_module()
@checked(PruningError, detector_type=TYPE, spatial_cfg=MAPPING)
def SpatialPruner(detector_type: str, spatial_cfg: Optional[dict] = None,  # noqa: N802
                  **kwargs: Any) -> nn.Module:
    """Build a detector of MMYOLO that predicts on its finest levels only in kept cells.

    This is the dynamic spatial pruning of `DSPDet3D <https://arxiv.org/abs/2305.03716>`_ in two
    dimensions; `QueryDet <https://arxiv.org/abs/2103.09136>`_ is related. A 1x1 convolution on a
    level decides which cells of the next finer level are computed. Training is dense, with a
    focal loss of the masks (``loss_spatial``) beside the detector's losses. When the detector
    predicts in eval mode, only tiles with kept cells are computed, exactly as in the dense
    detector, and dropped cells predict nothing.

    .. code-block:: python

        _base_ = 'any_detector.py'
        custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)
        model = dict(
            type='mmgcp.SpatialPruner',
            detector_type=_base_.model.type,
            spatial_cfg=dict(levels=[4, 8], tau=0.4))

    This is a function that the registry calls like a class. The result has the class of the
    plain detector and all its modules under their own names, and beside them
    ``spatial_masks``. Checkpoints of the plain detector can be loaded, and the other way round.

    What a tile goes through are the head's layers of the level and, on the finest level, what
    the neck computes for it alone: all of the level of a
    :class:`mmgcp.models.necks.FinerLevelMixin`, or the last layers of another neck of MMYOLO.

    Args:
        detector_type (str): Type of the detector, for example ``'YOLODetector'`` or
            ``'mmgcp.PrunedDetector'``.
        spatial_cfg (dict, optional): See :class:`mmgcp.spatial.SpatialSettings`.
        **kwargs: The arguments of the detector.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: A setting is unknown or not allowed, the detector is none of MMYOLO's, or
            its layers cannot be computed tile by tile.
    """
    settings = read_settings(dict(spatial_cfg or {}))
    model = build_model(MODELS, dict(type=detector_type, **kwargs),
                        f'detector_type {detector_type!r}', PruningError)
    strides = _find_strides(model)
    number = pruned_levels(settings, strides)
    part = _own_part(model.neck)
    channels, inputs = _look_at_maps(model, part, strides)
    layers = [LevelLayers(model.bbox_head.head_module, level, channels,
                          part if level == 0 else None,
                          inputs if level == 0 else [(channels[level], 1)],
                          settings.tile, f'the level of stride {strides[level]}')
              for level in range(number)]
    with torch.random.fork_rng(devices=[]):  # the weights drawn later are those of the detector
        masks = SpatialMasks({strides[level]: channels[level] for level in range(1, number + 1)})
    SpatialInference(model, masks, layers, strides[:number + 1], _score_kinds(model),
                     settings).insert()
    return model


def find_inference(model: nn.Module) -> Optional[SpatialInference]:
    """Return what prunes the cells of a detector; None if nothing does."""
    return getattr(model.__dict__.get('predict'), '__self__', None) if (
        hasattr(model, ATTRIBUTE)) else None


def _find_strides(model: nn.Module) -> List[int]:
    """Return the strides of the head's levels."""
    head = getattr(model, 'bbox_head', None)
    strides = list(getattr(getattr(head, 'head_module', None), 'featmap_strides', ()))
    if not strides or getattr(model, 'neck', None) is None:
        raise PruningError(f'a {type(model).__name__} has not the parts of a detector of MMYOLO: '
                           'a neck, and a head with a head_module')
    if strides != sorted(strides):
        raise PruningError(f'the strides of the head must increase, but are {strides}')
    return strides


def _own_part(neck: nn.Module) -> Optional[nn.Module]:
    """Return the module of a neck that computes its finest level, and nothing for others."""
    finer = getattr(neck, 'finer', None)
    if isinstance(finer, FinerLevel):
        return finer
    layers = getattr(neck, 'out_layers', ()) if isinstance(neck, BaseYOLONeck) else ()
    return layers[0] if len(layers) and not isinstance(layers[0], nn.Identity) else None


def _look_at_maps(model: nn.Module, part: Optional[nn.Module],
                  strides: Sequence[int]) -> Tuple[List[int], List[Tuple[int, int]]]:
    """Return the channels of the maps that the head reads, and the finest level's inputs.

    An input has its number of channels and its stride in cells of the level.
    """
    side, seen = SIDE * strides[-1], []
    handles = [part.register_forward_pre_hook(lambda _, args: seen.append(args))] if part else []
    with hooked(handles):
        maps = _run_neck(model, side)
    emitted = [side // map_.shape[-1] for map_ in maps]
    if emitted != list(strides):
        raise PruningError(f'the neck emits maps of the strides {emitted}, but the head reads '
                           f'{list(strides)}')
    inputs = seen[-1] if seen else (maps[0], )
    return [map_.shape[1] for map_ in maps], [
        (map_.shape[1], maps[0].shape[-1] // map_.shape[-1]) for map_ in inputs]


def _run_neck(model: nn.Module, side: int) -> Sequence[Tensor]:
    """Return the maps of an image of zeros, of three channels or as many as a layer reads."""
    weight = next(model.parameters())
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    for channels in (3, first.in_channels):
        try:
            with torch.no_grad(), eval_mode(model):
                return model.extract_feat(weight.new_zeros(1, channels, side, side))
        except Exception as error:  # whatever its layers raise
            reason = error
    raise PruningError(f'the detector does not run on an image of {side} x {side}: '
                       f'{told(reason)}')


def _score_kinds(model: nn.Module) -> List[bool]:
    """Say which kinds of predictions are scores, by their names in ``predict_by_feat``."""
    names = list(inspect.signature(model.bbox_head.predict_by_feat).parameters)
    names = names[:names.index('batch_img_metas')]
    return [name.startswith(('cls', 'objectness')) for name in names]

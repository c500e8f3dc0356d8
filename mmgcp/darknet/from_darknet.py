# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Conversion of Darknet's cfg and weights to a config and a checkpoint of mmgcp."""
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from mmdet.visualization import get_palette
from mmengine.config import Config
from mmengine.hub import get_config
from mmyolo.models.utils import make_round

from mmgcp.pruning.detector import make_pruned_config
from mmgcp.utils.config import build_detector, replace_scale
from mmgcp.utils.config_content import plain_content

from .base_network import changed_channels, find_widen_factor
from .cfg import DarknetError, Section, shorten
from .layers import BN_EPS, STAGE_BLOCKS
from .matching import channel_table, count_blocks, match_layers
from .weights import Header, read_weights

BASE_CONFIG = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'
STRIDES = [8, 16, 32]
# What the numbers of a cfg may be; LVIS has 1203 classes
CLASSES, SIDES, ANCHORS, SCALES = (1, 2000), (32, 8192), (1e-3, 1e5), (0.1, 10.)

# What to take from the base config; its other variables only describe its own model.
_KEPT_KEYS = (
    'default_hooks', 'custom_hooks', 'env_cfg', 'vis_backends', 'visualizer', 'log_processor',
    'log_level', 'load_from', 'resume', 'optim_wrapper', 'param_scheduler', 'train_cfg',
    'val_cfg', 'test_cfg', 'train_pipeline', 'test_pipeline', 'train_dataloader',
    'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator', 'tta_model',
    'tta_pipeline', 'img_scale')


def model_config(sections: Sequence[Section]) -> dict:
    """Translate a cfg to the config of a detector with the same channels.

    If no widen_factor gives these channels, the detector is a
    :func:`mmgcp.pruning.PrunedDetector`.

    Args:
        sections (Sequence[Section]): All sections of the cfg.

    Returns:
        dict: The model config.

    Raises:
        DarknetError: The cfg is not YOLOv4, has more channels than a YOLOv4 twice as
            wide, numbers of residual blocks that no deepen_factor gives, or another number that
            is out of bounds.
    """
    unpruned = Config(dict(model=_unpruned_model(sections)))
    return plain_content(_with_channels(unpruned, sections))['model']


def _with_channels(config: Config, sections: Sequence[Section]) -> Config:
    """Give a config of the unpruned detector the channels of the cfg, if they differ."""
    changed = changed_channels(sections, config.model.backbone.widen_factor, _build_shallow)
    return make_pruned_config(config, 'mmyolo.YOLODetector', changed) if changed else config


def _unpruned_model(sections: Sequence[Section]) -> dict:
    """The config of the narrowest model with at least the channels of the cfg."""
    channel_table(sections)
    deepen_factor = infer_deepen_factor(count_blocks(sections))
    head = _head_config(sections)
    return _model(head, deepen_factor, find_widen_factor(sections, _build_shallow))


@lru_cache(maxsize=None)
def _build_shallow(widen_factor: float) -> nn.Module:
    """Build an unpruned detector with one block in each stage, of two classes."""
    head = _head(2, [[(8., 8.)]] * 3, [1.] * 3, 1., 0.5)
    return build_detector(Config(dict(model=_model(head, 0.1, widen_factor))))


def _model(head: dict, deepen_factor: float, widen_factor: float) -> dict:
    scaling = dict(
        widen_factor=widen_factor, norm_cfg=dict(type='BN', momentum=0.03, eps=BN_EPS))
    return dict(
        type='YOLODetector',
        data_preprocessor=dict(
            type='YOLOv5DetDataPreprocessor', mean=[0., 0., 0.], std=[255., 255., 255.],
            bgr_to_rgb=True),
        backbone=dict(
            type='mmgcp.YOLOv4CSPDarknet', deepen_factor=deepen_factor, **scaling),
        neck=dict(
            type='mmgcp.YOLOv4PAFPN', deepen_factor=deepen_factor,
            in_channels=[256, 512, 1024], out_channels=[128, 256, 512], **scaling),
        bbox_head=dict(head, head_module=dict(head['head_module'], **scaling)),
        test_cfg=dict(
            multi_label=True, nms_pre=30000, score_thr=0.001,
            nms=dict(type='nms', iou_threshold=0.65), max_per_img=300))


def infer_deepen_factor(num_blocks: Sequence[int]) -> float:
    """Find a deepen_factor that gives these numbers of residual blocks.

    Args:
        num_blocks (Sequence[int]): Residual blocks of each stage.

    Returns:
        float: The factor.

    Raises:
        DarknetError: No factor with at most two decimals gives them.
    """
    for factor in (1.0, 0.33, 0.67, *(i / 100 for i in range(1, 500))):
        if [make_round(blocks, factor) for blocks in STAGE_BLOCKS] == list(num_blocks):
            return factor
    raise DarknetError(f'no deepen_factor gives stages of {list(num_blocks)} residual blocks')


def _head_config(sections: Sequence[Section]) -> dict:
    """The config of the head, without its widen_factor and norm_cfg."""
    yolos = [section for section in sections if section.name == 'yolo']
    base_sizes = [_anchors(section) for section in yolos]
    num_classes = num_classes_of(yolos[0])
    _check_yolos(sections, num_classes, len(base_sizes[0]))
    return _head(num_classes, base_sizes,
                 [section.number('scale_x_y', '1', SCALES) for section in yolos],
                 yolos[0].number('iou_thresh', '1', (0, 1)),
                 yolos[0].number('ignore_thresh', '.5', (0, 1)))


def num_classes_of(yolo: Section) -> int:
    """Return the number of classes of a section [yolo]; DarknetError if it is out of bounds."""
    return yolo.integer('classes', '20', CLASSES)


def input_size_of(net: Section) -> Tuple[int, int]:
    """Return width and height of a section [net]; DarknetError if YOLOv4 does not run on that."""
    size = net.integer('width', '416', SIDES), net.integer('height', '416', SIDES)
    if size[0] % 32 or size[1] % 32:
        raise DarknetError(f'{net}: the input size {size[0]}x{size[1]} is not a multiple of 32')
    return size


def check_numbers(sections: Sequence[Section]) -> None:
    """Raise a DarknetError if a number of a YOLOv4 cfg is out of bounds."""
    channel_table(sections)
    input_size_of(sections[0])
    _head_config(sections)


def _head(num_classes: int, base_sizes: list, scale_x_y: List[float], match_iou_thr: float,
          ignore_iou_thr: float) -> dict:
    """The config of a head, given its anchors (width, height) by level."""
    return dict(
        type='mmgcp.YOLOv4Head',
        head_module=dict(
            type='mmgcp.YOLOv4HeadModule', num_classes=num_classes,
            in_channels=[128, 256, 512], featmap_strides=STRIDES,
            num_base_priors=len(base_sizes[0])),
        prior_generator=dict(
            type='mmdet.YOLOAnchorGenerator', base_sizes=base_sizes, strides=STRIDES),
        bbox_coder=dict(
            type='mmgcp.YOLOv4BBoxCoder', scale_x_y=scale_x_y, strides=STRIDES),
        loss_cls=dict(
            type='mmdet.CrossEntropyLoss', use_sigmoid=True, reduction='mean',
            loss_weight=0.5 * num_classes / 80),
        match_iou_thr=match_iou_thr,
        ignore_iou_thr=ignore_iou_thr)


def _anchors(section: Section) -> List[Tuple[float, float]]:
    """The anchors (width, height) of a level in pixels."""
    numbers = section.floats('anchors', bounds=ANCHORS)
    mask = section.ints('mask', bounds=(0, 1000))
    if len(numbers) % 2 or max(mask) >= len(numbers) // 2 or min(mask) < 0:
        raise DarknetError(f'{section}: mask={shorten(section.options["mask"])} does not fit '
                           f'the {len(numbers)} numbers of anchors')
    return [(numbers[2 * i], numbers[2 * i + 1]) for i in mask]


def _check_yolos(sections: Sequence[Section], num_classes: int, num_anchors: int):
    """The levels must agree, and the convolutions before them have the channels they need."""
    filters = num_anchors * (5 + num_classes)
    for before, section in zip(sections, sections[1:]):
        if section.name != 'yolo':
            continue
        if (num_classes_of(section), len(section.ints('mask'))) != (num_classes, num_anchors):
            raise DarknetError(f'{section} differs from the first [yolo] in its number of '
                               'classes or anchors')
        if before.integer('filters') != filters:
            raise DarknetError(
                f'{before} has {before.integer("filters")} filters, but {section} with '
                f'{num_anchors} anchors and {num_classes} classes needs {filters}')


def load_parameters(sections: Sequence[Section],
                    path: Union[str, Path]) -> Tuple[Header, Dict[str, np.ndarray]]:
    """Read the weights of a YOLOv4 network; a partial file gives its first layers.

    Args:
        sections (Sequence[Section]): All sections of the cfg.
        path (str | Path): The weights file.

    Returns:
        tuple[Header, dict[str, np.ndarray]]: The header and the parameters by their
        keys in the state dict.
    """
    channels = channel_table(sections)
    shapes = [(f'layer {index}, {layer}', layer.parameter_shapes(channels[layer.module]))
              for index, layer in enumerate(match_layers(sections)) if layer.module]
    return read_weights(path, shapes)


def checkpoint(parameters: Dict[str, np.ndarray], header: Header,
               classes: Sequence[str]) -> dict:
    """Make a checkpoint for :func:`mmdet.apis.init_detector` or ``init_cfg``.

    Args:
        parameters (dict[str, np.ndarray]): The parameters.
        header (Header): Header of the weights file.
        classes (Sequence[str]): Names of the classes.

    Returns:
        dict: The checkpoint.
    """
    state_dict = {}
    for key, array in parameters.items():
        state_dict[key] = torch.from_numpy(array)
        if key.endswith('.running_var'):
            name = key[:-len('running_var')]
            state_dict[f'{name}num_batches_tracked'] = torch.tensor(0)
    dataset_meta = dict(classes=tuple(classes), palette=get_palette('random', len(classes)))
    return dict(
        meta=dict(dataset_meta=dataset_meta, darknet=vars(header)), state_dict=state_dict)


def complete_config(sections: Sequence[Section], classes: Sequence[str],
                    checkpoint_name: str = 'pruned.pth') -> Config:
    """Make a complete config for training and inference.

    Everything except the model and the input size is as in MMYOLO's config of YOLOv5-s on
    COCO. The config of a pruned network loads a checkpoint from its own folder, as the configs
    that tools/prune.py writes do.

    Args:
        sections (Sequence[Section]): All sections of the cfg.
        classes (Sequence[str]): Names of the classes.
        checkpoint_name (str): Name of the checkpoint of a pruned network.
            Defaults to 'pruned.pth'.

    Returns:
        Config: The config.

    Raises:
        DarknetError: See :func:`model_config`.
    """
    scale = input_size_of(sections[0])
    base = get_config(BASE_CONFIG)
    config = {key: value for key, value in plain_content(base).items() if key in _KEPT_KEYS}
    config = replace_scale(config, tuple(base.img_scale), scale)
    config.update(
        model=_unpruned_model(sections),
        num_classes=len(classes),
        custom_imports=dict(imports=['mmgcp'], allow_failed_imports=False),
        default_scope='mmyolo')
    metainfo = dict(classes=tuple(classes), palette=get_palette('random', len(classes)))
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        dataset = config[name]['dataset']
        dataset['metainfo'] = metainfo
        if dataset.get('batch_shapes_cfg'):
            dataset['batch_shapes_cfg']['img_size'] = max(scale)
    complete = _with_channels(Config(config), sections)
    if is_pruned(complete):
        complete.load_from = f'{{{{ fileDirname }}}}/{checkpoint_name}'
    return complete


def is_pruned(config: Config) -> bool:
    """Whether a config of this module describes a pruned network."""
    return config.model.type == 'mmgcp.PrunedDetector'

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Conversion of a detector of mmgcp to Darknet's cfg and weights."""
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmengine.config import Config
from torch import Tensor

from mmgcp.models import YOLOv4CSPDarknet, YOLOv4Head, YOLOv4PAFPN
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.config import build_detector, image_size_said

from .cfg import DarknetError, Section, first_line
from .layers import BN_EPS, NUM_STAGES, SPP_KERNELS, Layer, yolov4_layers
from .matching import channel_table, conv_channels

# Options of yolov4.cfg that a detector does not have
_NET_OPTIONS = dict(
    batch='64', subdivisions='8', width='', height='', channels='3', momentum='0.949',
    decay='0.0005', angle='0', saturation='1.5', exposure='1.5', hue='.1',
    learning_rate='0.0013', burn_in='1000', max_batches='500500', policy='steps',
    steps='400000,450000', scales='.1,.1', mosaic='1')
_YOLO_OPTIONS = dict(
    jitter='.3', truth_thresh='1', random='1', cls_normalizer='1.0', iou_normalizer='0.07',
    iou_loss='ciou', nms_kind='greedynms', beta_nms='0.6', max_delta='5')


def load_detector(config: Config, path: str) -> Tuple[nn.Module, dict]:
    """Build the detector of a config and load a complete checkpoint.

    Args:
        config (Config): The config.
        path (str): The checkpoint.

    Returns:
        tuple[nn.Module, dict]: The detector in eval mode and the metadata of the checkpoint.

    Raises:
        UserError: The detector is not YOLOv4, or the checkpoint does not fit it.
    """
    try:
        detector = build_detector(config)
    except Exception as error:  # constructors of models may raise anything
        raise DarknetError(f'the model of {config.filename} cannot be built: '
                           f'{first_line(error)}') from error
    check_model(detector)
    meta = load_strictly(detector, path, config.filename)
    return detector.eval(), meta


def check_model(detector: nn.Module) -> None:
    """Check that a detector is a YOLOv4 that Darknet can run, pruned or not.

    Args:
        detector (nn.Module): The detector.

    Raises:
        DarknetError: It is another detector; the message says where it differs.
    """
    parts = dict(backbone=YOLOv4CSPDarknet, neck=YOLOv4PAFPN, bbox_head=YOLOv4Head)
    for name, expected in parts.items():
        part = getattr(detector, name, None)
        if part is None:
            raise DarknetError(f'the model is not YOLOv4: a {type(detector).__name__} '
                               f'has no {name}')
        if not isinstance(part, expected):
            raise DarknetError(f'the model is not YOLOv4: its {name} is a '
                               f'{type(part).__name__}, not a {expected.__name__}')
    poolings = tuple(pool.kernel_size for pool in detector.neck.reduce_layers[2].poolings)
    if poolings != SPP_KERNELS:
        raise DarknetError(f'the model is not YOLOv4: it pools over {poolings}, '
                           f'not {SPP_KERNELS}')
    for name, module in detector.backbone.named_modules():
        if isinstance(module, nn.Identity) and '.blocks.' in name:
            raise DarknetError(f'backbone.{name} has been removed by pruning, and only detectors '
                               'with all of their blocks can be converted')
    _check_parameters(detector)


def _check_parameters(detector: nn.Module):
    """Check that the convolutions are those of Darknet's layers, and that there are no others."""
    unknown = {name for name, _ in detector.named_parameters()}
    for layer in _convolutions(detector):
        _check_conv(layer, detector.get_submodule(layer.module))
        keys = layer.parameter_shapes(conv_channels(detector, layer.module))
        unknown -= {*keys, f'{layer.module}.conv.bias'}
    if unknown:
        raise DarknetError(f'the model is not YOLOv4: it has a parameter {min(unknown)}')


def _check_conv(layer: Layer, module: nn.Module):
    activation = 'linear'
    if isinstance(module, ConvModule):
        activation = _activation(module)
        if not (module.with_norm and isinstance(module.norm, nn.modules.batchnorm._BatchNorm)):
            raise DarknetError(f'{layer.module} has no batch normalisation')
    conv = getattr(module, 'conv', module)
    kernel, stride = layer.integer('size'), layer.integer('stride')
    expected = ((kernel, ) * 2, (stride, ) * 2, (kernel // 2, ) * 2, layer.options['activation'])
    found = (conv.kernel_size, conv.stride, conv.padding, activation)
    names = ('kernel size', 'stride', 'padding', 'activation')
    for name, expected_value, found_value in zip(names, expected, found):
        if expected_value != found_value:
            raise DarknetError(f'{layer.module} has the {name} {found_value}, but YOLOv4 has '
                               f'{expected_value} in Darknet')
    if conv.groups != 1 or conv.dilation != (1, 1):
        raise DarknetError(f'{layer.module} has groups or a dilation, which YOLOv4 has not')


def _activation(module: ConvModule) -> str:
    activate = getattr(module, 'activate', None)
    if isinstance(activate, nn.Mish):
        return 'mish'
    if isinstance(activate, nn.LeakyReLU) and activate.negative_slope == 0.1:
        return 'leaky'
    return 'linear' if activate is None else str(activate)


def _layers(detector: nn.Module) -> List[Layer]:
    stages = [getattr(detector.backbone, f'stage{i + 1}') for i in range(NUM_STAGES)]
    return yolov4_layers([len(stage[1].blocks) for stage in stages])


def _convolutions(detector: nn.Module) -> List[Layer]:
    return [layer for layer in _layers(detector) if layer.module]


def darknet_sections(detector: nn.Module, size: Tuple[int, int]) -> List[Section]:
    """Describe a detector as a cfg.

    Args:
        detector (nn.Module): A YOLOv4 detector, see :func:`check_model`.
        size (tuple[int, int]): Width and height of the input, multiples of 32.

    Returns:
        list[Section]: All sections.

    Raises:
        DarknetError: The size is not a multiple of 32, or a layer takes other channels
            than it gets from the layers before it.
    """
    width, height = size
    if min(size) <= 0 or width % 32 or height % 32:
        raise DarknetError(f'the input size {width}x{height} is not a multiple of 32')
    sections = [Section('net', {**_NET_OPTIONS, 'width': str(width), 'height': str(height)})]
    level = 0
    for layer in _layers(detector):
        options = dict(layer.options)
        if layer.module:
            filters = dict(filters=str(conv_channels(detector, layer.module)[1]))
            options = {**filters, **options}
        elif layer.name == 'yolo':
            options = _yolo_options(detector.bbox_head, level)
            level += 1
        sections.append(Section(layer.name, options))
    for name, expected in channel_table(sections).items():
        found = conv_channels(detector, name)
        if found != expected:
            raise DarknetError(f'{name} takes {found[0]} channels, but gets {expected[0]}')
    return sections


def _yolo_options(head: nn.Module, level: int) -> Dict[str, str]:
    anchors = head.prior_generator.base_sizes
    num_anchors = len(anchors[level])
    first = sum(len(sizes) for sizes in anchors[:level])
    mask = range(first, first + num_anchors)
    numbers = [number for sizes in anchors for anchor in sizes for number in anchor]
    return dict(
        mask=','.join(map(str, mask)),
        anchors=','.join(_number(number) for number in numbers),
        classes=str(head.num_classes),
        num=str(sum(len(sizes) for sizes in anchors)),
        ignore_thresh=_number(head.ignore_iou_thr),
        iou_thresh=_number(head.match_iou_thr),
        scale_x_y=_number(head.bbox_coder.scale_x_y[head.featmap_strides[level]]),
        **_YOLO_OPTIONS)


def _number(value: float) -> str:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise DarknetError(f'the model has {value!r} where a number should be') from None
    return str(int(number)) if number.is_integer() else repr(number)


def darknet_parameters(detector: nn.Module) -> List[np.ndarray]:
    """List the parameters of a detector in Darknet's order.

    Batch normalisation is converted to Darknet's epsilon, and the bias that a convolution
    before it may have is subtracted from its running mean. The network computes the same.

    Args:
        detector (nn.Module): A YOLOv4 detector, see :func:`check_model`.

    Returns:
        list[np.ndarray]: The parameters.

    Raises:
        DarknetError: Some are not finite in single precision.
    """
    arrays: List[np.ndarray] = []
    for layer in _convolutions(detector):
        module = detector.get_submodule(layer.module)
        state = {f'{layer.module}.{key}': value for key, value in module.state_dict().items()}
        if layer.has_norm:
            norm = _darknet_norm(module.norm, module.conv.bias)
            state.update({f'{layer.module}.bn.{key}': value for key, value in norm.items()})
        keys = layer.parameter_shapes(conv_channels(detector, layer.module))
        for key in keys:
            arrays.append(state[key].detach().cpu().float().numpy())
            if not np.isfinite(arrays[-1]).all():
                raise DarknetError(f'{key} has values that are not finite in Darknet\'s precision')
    return arrays


def _darknet_norm(norm: nn.Module, conv_bias: Optional[Tensor]) -> Dict[str, Tensor]:
    """The statistics and the scale that have the same effect with Darknet's epsilon."""
    weight, mean, var = norm.weight, norm.running_mean, norm.running_var
    if conv_bias is not None:
        mean = mean - conv_bias
    if norm.eps != BN_EPS:
        shifted = var.double() + (norm.eps - BN_EPS)
        if bool((shifted > 0).all()):
            var = shifted
        else:
            ratio = (var.double() + BN_EPS) / (var.double() + norm.eps)
            weight = weight.double() * ratio.sqrt()
    return dict(weight=weight, running_mean=mean, running_var=var)


def input_size(config: Config) -> Tuple[int, int]:
    """Find the width and height of the images that a config tests its detector on.

    Args:
        config (Config): The config.

    Returns:
        tuple[int, int]: Width and height.

    Raises:
        DarknetError: The config does not say it; see :func:`mmgcp.utils.config.image_size_said`.
    """
    size = image_size_said(config)
    if size is None:
        raise DarknetError(f'{config.filename} does not say the input size: give --input-size')
    return size

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers of YOLOv4 in Darknet's order and the modules of mmgcp they belong to.

:func:`yolov4_layers` is the one description of the network that reading and
writing share.
"""
from typing import Dict, List, Sequence, Tuple

import torch.nn as nn

from .cfg import DarknetError, Section

NUM_STAGES = 5
STAGE_BLOCKS = (1, 2, 8, 8, 4)
SPP_KERNELS = (5, 9, 13)
BN_EPS = 1e-5

# What Darknet assumes for an option that is not written. An option of a layer has
# this value unless the layer's table entry has another one.
_DEFAULTS = {
    'convolutional': dict(batch_normalize='0', size='1', stride='1', activation='logistic',
                          groups='1', dilation='1', antialiasing='0', flipped='0'),
    'maxpool': dict(size='1', stride='1'),
    'route': dict(groups='1'),
    'shortcut': dict(activation='linear', weights_type='none'),
    'upsample': dict(stride='2', scale='1'),
    'yolo': dict(new_coords='0'),
}


class Layer(Section):
    """A layer of YOLOv4: a section with the options that the architecture fixes.

    Args:
        name (str): Name of the cfg section.
        options (dict[str, str]): Options that the architecture fixes.
        module (str): Name of the convolution in a detector of mmgcp, empty for
            layers without parameters. Defaults to ''.
    """

    def __init__(self, name: str, options: Dict[str, str], module: str = ''):
        super().__init__(name, options)
        self.module = module

    def __str__(self) -> str:
        return f'[{self.name}] ({self.module})' if self.module else f'[{self.name}]'

    @property
    def has_norm(self) -> bool:
        """bool: Whether the convolution is followed by batch normalisation."""
        return self.options.get('batch_normalize') == '1'

    def parameter_shapes(self, channels: Tuple[int, int]) -> Dict[str, Tuple[int, ...]]:
        """Keys in the state dict and shapes of the parameters, in Darknet's order.

        Args:
            channels (tuple[int, int]): Numbers of input and output channels.

        Returns:
            dict[str, tuple[int, ...]]: Shape of each parameter and statistic.
        """
        num_inputs, num_outputs = channels
        kernel = self.integer('size')
        weight = (num_outputs, num_inputs, kernel, kernel)
        if not self.has_norm:
            return {f'{self.module}.bias': (num_outputs, ), f'{self.module}.weight': weight}
        names = ('bias', 'weight', 'running_mean', 'running_var')
        shapes = {f'{self.module}.bn.{name}': (num_outputs, ) for name in names}
        return {**shapes, f'{self.module}.conv.weight': weight}


class _LayerList(list):
    """A list of layers that grows by one layer a call."""

    def conv(self, module: str, size: int, stride: int = 1, activation: str = 'leaky'):
        self.append(Layer('convolutional', dict(
            batch_normalize='1', size=str(size), stride=str(stride), pad='1',
            activation=activation), module))

    def alternating_convs(self, module: str, num_convs: int):
        for i in range(num_convs):
            self.conv(f'{module}.{i}', 3 if i % 2 else 1)

    def route(self, *sources: int):
        self.append(Layer('route', dict(layers=','.join(map(str, sources)))))

    def offset(self, index: int) -> int:
        return index - len(self)


def yolov4_layers(num_blocks: Sequence[int] = STAGE_BLOCKS) -> List[Layer]:
    """Describe YOLOv4 layer by layer.

    Args:
        num_blocks (Sequence[int]): Residual blocks of each of the five stages.
            Defaults to (1, 2, 8, 8, 4), which gives the 162 layers of ``yolov4.cfg``.

    Returns:
        list[Layer]: The layers in Darknet's order, without the section ``[net]``.
    """
    layers = _LayerList()
    layers.conv('backbone.stem', 3, activation='mish')
    stages = []
    for i, blocks in enumerate(num_blocks, 1):
        _add_stage(layers, f'backbone.stage{i}', blocks)
        stages.append(len(layers) - 1)
    _add_spp(layers, 'neck.reduce_layers.2')
    pyramid = {2: len(layers) - 1}
    for i, level in enumerate((1, 0)):
        _add_top_down(layers, i, level, stages[level + 2])
        pyramid[level] = len(layers) - 1
    _add_head(layers, 0)
    for level in (1, 2):
        _add_bottom_up(layers, level - 1, pyramid[level])
        _add_head(layers, level)
    return list(layers)


def _add_stage(layers: _LayerList, name: str, num_blocks: int):
    layers.conv(f'{name}.0', 3, stride=2, activation='mish')
    short = len(layers)
    layers.conv(f'{name}.1.short_conv', 1, activation='mish')
    layers.route(-2)
    layers.conv(f'{name}.1.main_conv', 1, activation='mish')
    for i in range(num_blocks):
        layers.conv(f'{name}.1.blocks.{i}.conv1', 1, activation='mish')
        layers.conv(f'{name}.1.blocks.{i}.conv2', 3, activation='mish')
        layers.append(Layer('shortcut', {'from': '-3', 'activation': 'linear'}))
    layers.conv(f'{name}.1.post_conv', 1, activation='mish')
    layers.route(-1, layers.offset(short))
    layers.conv(f'{name}.1.final_conv', 1, activation='mish')


def _add_spp(layers: _LayerList, name: str):
    layers.alternating_convs(f'{name}.pre_convs', 3)
    source = len(layers) - 1
    for kernel in SPP_KERNELS:
        if len(layers) - 1 > source:
            layers.route(layers.offset(source))
        layers.append(Layer('maxpool', dict(stride='1', size=str(kernel))))
    layers.route(-1, -3, -5, -6)
    layers.alternating_convs(f'{name}.post_convs', 3)


def _add_top_down(layers: _LayerList, idx: int, level: int, stage: int):
    layers.conv(f'neck.upsample_layers.{idx}.0', 1)
    layers.append(Layer('upsample', dict(stride='2')))
    layers.route(stage)
    layers.conv(f'neck.reduce_layers.{level}', 1)
    layers.route(-1, -3)
    layers.alternating_convs(f'neck.top_down_layers.{idx}', 5)


def _add_bottom_up(layers: _LayerList, idx: int, source: int):
    layers.route(-4)
    layers.conv(f'neck.downsample_layers.{idx}', 3, stride=2)
    layers.route(-1, layers.offset(source))
    layers.alternating_convs(f'neck.bottom_up_layers.{idx}', 5)


def _add_head(layers: _LayerList, level: int):
    layers.conv(f'bbox_head.head_module.convs_bridge.{level}', 3)
    layers.append(Layer(
        'convolutional', dict(size='1', stride='1', pad='1', activation='linear'),
        f'bbox_head.head_module.convs_pred.{level}'))
    layers.append(Layer('yolo', {}))


def count_blocks(sections: Sequence[Section]) -> List[int]:
    """Count the residual blocks of each stage of a cfg.

    Every convolution with stride 2 begins a stage; a stage counts as one block if it
    has none, so that :func:`match_layers` can say where the cfg differs from YOLOv4.

    Args:
        sections (Sequence[Section]): All sections of the cfg.

    Returns:
        list[int]: Number of blocks of each of the five stages.
    """
    counts: List[int] = []
    for section in sections:
        if section.name == 'convolutional' and section.options.get('stride') == '2':
            counts.append(0)
        elif section.name == 'shortcut' and counts:
            counts[-1] += 1
    counts = (counts + [0] * NUM_STAGES)[:NUM_STAGES]
    return [max(count, 1) for count in counts]


def match_layers(sections: Sequence[Section]) -> List[Layer]:
    """Check that a cfg is a YOLOv4 network, whatever its depth and its channels.

    Args:
        sections (Sequence[Section]): All sections of the cfg.

    Returns:
        list[Layer]: The layers that the sections after ``[net]`` are.

    Raises:
        DarknetError: The cfg is another network; the message has the first difference.
    """
    layers = yolov4_layers(count_blocks(sections))
    for index, layer in enumerate(layers):
        if index + 1 >= len(sections):
            raise DarknetError(f'not a YOLOv4 network: it ends before layer {index}, {layer}')
        _check_layer(index, layer, sections[index + 1])
    if len(sections) > len(layers) + 1:
        raise DarknetError(f'not a YOLOv4 network: {sections[len(layers) + 1]} follows the '
                           f'last of the {len(layers)} layers')
    return layers


def _check_layer(index: int, layer: Layer, section: Section):
    if section.name != layer.name:
        raise DarknetError(f'not a YOLOv4 network: layer {index} should be {layer}, '
                           f'but is {section}')
    options = dict.fromkeys((*layer.options, *_DEFAULTS[layer.name]))
    for key in options:
        expected, found = (_effective(key, index, part) for part in (layer, section))
        if expected != found:
            raise DarknetError(
                f'not a YOLOv4 network: layer {index}, {section}, should have '
                f'{key}={_text(expected)}, but has {key}={_text(found)}')


def _effective(key: str, index: int, section: Section):
    """The meaning of an option: an absolute layer, a padding in pixels, a number or a text."""
    text = section.options.get(key, _DEFAULTS[section.name].get(key, ''))
    if key in ('layers', 'from'):
        return sources(index, section)
    if key == 'pad':
        if section.integer('pad', '0'):
            return section.integer('size', '1') // 2
        return section.integer('padding', '0')
    return int(text) if text.isdecimal() else text


def _text(value) -> str:
    return ','.join(map(str, value)) if isinstance(value, list) else str(value)


def sources(index: int, section: Section) -> List[int]:
    """Indices of the layers that a layer takes its input from (-1 is the image).

    Args:
        index (int): Index of the layer.
        section (Section): The layer.

    Returns:
        list[int]: Absolute indices.
    """
    if section.name == 'route':
        steps = section.ints('layers')
    elif section.name == 'shortcut':
        steps = [-1] + section.ints('from')
    else:
        return [index - 1]
    return [index + step if step < 0 else step for step in steps]


def channel_table(sections: Sequence[Section]) -> Dict[str, Tuple[int, int]]:
    """Read the numbers of channels of all convolutions off a YOLOv4 cfg.

    Args:
        sections (Sequence[Section]): All sections of the cfg.

    Returns:
        dict[str, tuple[int, int]]: Input and output channels of each module, in
        Darknet's order.

    Raises:
        DarknetError: The cfg is not YOLOv4, a layer has no filters, or the inputs of a
            shortcut differ.
    """
    table = {}
    outputs = {-1: sections[0].integer('channels', '3')}
    for index, layer in enumerate(match_layers(sections)):
        section = sections[index + 1]
        inputs = [outputs[source] for source in sources(index, section)]
        if layer.name == 'shortcut' and len(set(inputs)) > 1:
            raise DarknetError(f'layer {index}, {section}, adds maps of {inputs[1]} and '
                               f'{inputs[0]} channels')
        outputs[index] = sum(inputs) if layer.name == 'route' else inputs[0]
        if layer.module:
            outputs[index] = section.integer('filters')
            if outputs[index] < 1:
                raise DarknetError(f'layer {index}, {section}, has {outputs[index]} filters')
            table[layer.module] = (inputs[0], outputs[index])
    return table


def conv_channels(detector: nn.Module, name: str) -> Tuple[int, int]:
    """Return the numbers of input and output channels of a convolution of a detector.

    Args:
        detector (nn.Module): The detector.
        name (str): Name of a ConvModule or a Conv2d in it.

    Returns:
        tuple[int, int]: The numbers of channels.
    """
    module = detector.get_submodule(name)
    weight = getattr(module, 'conv', module).weight
    return weight.shape[1], weight.shape[0]

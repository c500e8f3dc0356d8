# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The layers of YOLOv4 in Darknet's order, and the modules of mmgcp that they belong to.

:func:`yolov4_layers` is the only description of the network; reading and writing share it.
"""
from typing import Dict, List, Sequence, Tuple

from .cfg import Section

NUM_STAGES = 5
STAGE_BLOCKS = (1, 2, 8, 8, 4)
SPP_KERNELS = (5, 9, 13)
BN_EPS = 1e-5


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
        """Return the state dict keys and the shapes of the parameters, in Darknet's order.

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
    """A list of layers with methods that append some."""

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

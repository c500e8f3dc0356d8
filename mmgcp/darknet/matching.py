# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Whether a cfg describes YOLOv4, and how many channels its layers have."""
from typing import Dict, List, Sequence, Tuple

import torch.nn as nn

from .cfg import MAX_DIGITS, WHOLE_NUMBER, DarknetError, Section, shorten
from .layers import NUM_STAGES, Layer, yolov4_layers

# Darknet's defaults for options. The layers of YOLOv4 have these values, too, unless their
# description says otherwise.
_DEFAULTS = {
    'convolutional': dict(batch_normalize='0', size='1', stride='1', activation='logistic',
                          groups='1', dilation='1', antialiasing='0', flipped='0'),
    'maxpool': dict(size='1', stride='1'),
    'route': dict(groups='1'),
    'shortcut': dict(activation='linear', weights_type='none'),
    'upsample': dict(stride='2', scale='1'),
    'yolo': dict(new_coords='0'),
}


def count_blocks(sections: Sequence[Section]) -> List[int]:
    """Count the residual blocks of each stage of a cfg.

    Each convolution with stride 2 begins a stage. A stage without blocks counts as having
    one, so that :func:`match_layers` can say where the cfg differs from YOLOv4.

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
        list[Layer]: The layers that the sections after ``[net]`` stand for.

    Raises:
        DarknetError: The cfg is another network; the message names the first difference.
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
    """The meaning of an option: indices of layers, a padding in pixels, a number or a text."""
    text = section.options.get(key, _DEFAULTS[section.name].get(key, ''))
    if key in ('layers', 'from'):
        return sources(index, section)
    if key == 'pad':
        if section.integer('pad', '0'):
            return section.integer('size', '1') // 2
        return section.integer('padding', '0')
    return int(text) if WHOLE_NUMBER.fullmatch(text) and len(text) < MAX_DIGITS else text


def _text(value) -> str:
    return shorten(','.join(map(str, value)) if isinstance(value, list) else str(value))


def sources(index: int, section: Section) -> List[int]:
    """Find the layers that a layer takes its input from.

    Args:
        index (int): Index of the layer.
        section (Section): The layer.

    Returns:
        list[int]: Their indices; -1 stands for the image.
    """
    if section.name == 'route':
        steps = section.ints('layers')
    elif section.name == 'shortcut':
        steps = [-1] + section.ints('from')
    else:
        return [index - 1]
    return [index + step if step < 0 else step for step in steps]


def channel_table(sections: Sequence[Section]) -> Dict[str, Tuple[int, int]]:
    """Read the numbers of channels of all convolutions from a YOLOv4 cfg.

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
    if sections[0].integer('channels', '3') != 3:
        raise DarknetError(f'{sections[0]}: only images of 3 channels are supported')
    outputs = {-1: 3}
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

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Networks as other programs prune them: nothing but a cfg with any filters and its weights.

The channels are worked out here once more, so that a test does not compare
:mod:`mmgcp.darknet` with itself.
"""
import numpy as np
from darknet_samples import SIZE, build, tiny_config

from mmgcp.darknet import darknet_sections, format_cfg


def tiny_sections(**kwargs):
    """The sections of an unpruned network; see :func:`darknet_samples.tiny_config`."""
    return darknet_sections(build(tiny_config(**kwargs)), SIZE)


def set_filters(sections, draw):
    """Give all convolutions but the predictions other filters, those that are added the same.

    Args:
        sections (list[Section]): The sections, changed in place.
        draw (Callable): Index of the layer and its present filters to its new ones.
    """
    layers, owners = sections[1:], {}
    for i, layer in enumerate(layers):
        owners[i] = i
        if layer.name == 'convolutional' and layers[i + 1].name != 'yolo':
            layer.options['filters'] = str(draw(i, layer.integer('filters')))
        elif layer.name == 'shortcut':
            owners[i] = owners[i + layer.integer('from')]
            layers[i - 1].options['filters'] = layers[owners[i]].options['filters']


def random_weights(sections, seed):
    """All parameters (N, ) of the file, such that activations are of the order of one."""
    random = np.random.RandomState(seed)
    outputs, values = {-1: 3}, []
    for i, layer in enumerate(sections[1:]):
        if layer.name == 'convolutional':
            filters, kernel = layer.integer('filters'), layer.integer('size')
            fan_in = outputs[i - 1] * kernel**2
            values.append(random.normal(0, 0.2, filters))  # biases
            if 'batch_normalize' in layer.options:
                values += [random.uniform(0.7, 1.3, filters), random.normal(0, 0.2, filters),
                           random.uniform(0.6, 1.4, filters)]  # scales, means, variances
            values.append(random.normal(0, 1 / np.sqrt(fan_in), filters * fan_in))
            outputs[i] = filters
        elif layer.name == 'route':
            outputs[i] = sum(outputs[step + i if step < 0 else step]
                             for step in layer.ints('layers'))
        else:
            outputs[i] = outputs[i - 1]
    return np.concatenate(values).astype('<f4')


def write_network(sections, folder, seed=0):
    """Write ``net.cfg`` and ``net.weights`` and return their paths."""
    cfg, weights = folder / 'net.cfg', folder / 'net.weights'
    cfg.write_text(format_cfg(sections))
    header = np.array([0, 2, 5, 11, 0], '<i4')
    weights.write_bytes(header.tobytes() + random_weights(sections, seed).tobytes())
    return cfg, weights


def pruned_sections(seed, low=1, high=24, **kwargs):
    """A network with random filters in every layer."""
    random = np.random.RandomState(seed)
    sections = tiny_sections(**kwargs)
    set_filters(sections, lambda index, filters: random.randint(low, high))
    return sections

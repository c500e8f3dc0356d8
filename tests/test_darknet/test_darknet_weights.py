# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import struct

import numpy as np
import pytest
import torch
from darknet_samples import build, tiny_config

from mmgcp.darknet import (
    DarknetError,
    Header,
    checkpoint,
    load_parameters,
    match_layers,
    model_config,
    read_cfg,
    read_weights,
    write_weights,
)

LAYERS = [('layer 0', {'a.bias': (2, ), 'a.weight': (2, 1, 1, 1)}), ('layer 2', {'b': (3, )})]


def test_round_trip_is_exact(tiny_model, tiny_files):
    cfg, weights = tiny_files
    sections = read_cfg(cfg)
    header, parameters = load_parameters(sections, weights)
    assert header == Header(0, 2, 5, 7)
    model = build(model_config(sections))
    model.load_state_dict(checkpoint(parameters, header, 'abc')['state_dict'])
    state = model.state_dict()
    for key, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize('header', [Header(0, 1, 0, 12345), Header(0, 2, 0, 2**40),
                                    Header(1, 0, 0, 2**40)])
def test_headers(tmp_path, header):
    path = tmp_path / 'a.weights'
    arrays = [np.arange(2.), np.arange(2.) + 2, np.arange(3.) + 4]
    write_weights(path, header, arrays)
    size = 16 if (header.major, header.minor) == (0, 1) else 20
    assert path.stat().st_size == size + 4 * 7
    found, parameters = read_weights(path, LAYERS)
    assert found == header
    assert parameters['a.weight'].shape == (2, 1, 1, 1)
    assert list(parameters['b']) == [4, 5, 6]


@pytest.mark.parametrize('num_bytes, message', [
    (0, 'ends inside its header'),
    (19, 'ends inside its header'),
    (20, 'holds no layer'),
    (20 + 15, 'ends inside layer 0: the layer needs 16 bytes, but 15 are left'),
    (20 + 16 + 4, 'ends inside layer 2: the layer needs 12 bytes, but 4 are left'),
    (20 + 16 + 12 + 5, 'has 5 bytes left over after the last layer, layer 2'),
])
def test_broken_files(tmp_path, num_bytes, message):
    path = tmp_path / 'a.weights'
    path.write_bytes((struct.pack('<3iq', 0, 2, 5, 0) + bytes(100))[:num_bytes])
    with pytest.raises(DarknetError, match=message):
        read_weights(path, LAYERS)


def test_partial_file(tiny_files, tiny_model, tmp_path):
    """Cut where `darknet partial` does: after the neck's top-down path."""
    cfg, weights = tiny_files
    sections = read_cfg(cfg)
    layers = match_layers(sections)
    last = [layer.module for layer in layers].index('neck.top_down_layers.1.4')
    state = tiny_model.state_dict()
    kept = [layer.module for layer in layers[:last + 1] if layer.module]
    num_values = sum(
        tensor.numel() for key, tensor in state.items()
        if key.startswith(tuple(f'{name}.' for name in kept))
        and not key.endswith('num_batches_tracked'))
    partial = tmp_path / 'tiny.conv'
    partial.write_bytes(weights.read_bytes()[:20 + 4 * num_values])

    header, parameters = load_parameters(sections, partial)
    content = checkpoint(parameters, header, 'abc')
    assert not any(key.startswith('bbox_head') for key in content['state_dict'])
    torch.save(content, tmp_path / 'partial.pth')

    config = tiny_config()
    config['backbone']['init_cfg'] = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'partial.pth'), prefix='backbone.')
    model = build(config)
    model.init_weights()
    for key, tensor in tiny_model.backbone.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[key]), key


def test_file_that_ends_inside_a_layer(tiny_files, tmp_path):
    cfg, weights = tiny_files
    broken = tmp_path / 'broken.weights'
    broken.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DarknetError, match=r'ends inside layer \d+, \[convolutional\] '
                       r'\(bbox_head.head_module.convs_pred.2\): the layer needs'):
        load_parameters(read_cfg(cfg), broken)

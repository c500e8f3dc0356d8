# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from darknet_samples import SIZE, build, tiny_config, write_darknet

from mmgcp.darknet import (
    DarknetError,
    Section,
    channel_table,
    darknet_parameters,
    darknet_sections,
    format_cfg,
    match_layers,
    model_config,
    parse_cfg,
    yolov4_layers,
)
from mmgcp.darknet.matching import sources


@pytest.fixture
def tiny_sections(tiny_model):
    return parse_cfg(format_cfg(darknet_sections(tiny_model, SIZE)))


def test_full_size_layers_are_those_of_yolov4_cfg():
    layers = yolov4_layers()
    assert len(layers) == 162
    assert sum(layer.name == 'convolutional' for layer in layers) == 110
    assert sum(layer.name == 'shortcut' for layer in layers) == 23
    routes = {
        3: [1], 9: [8, 2], 22: [21, 12], 53: [52, 25], 84: [83, 56], 103: [102, 87],
        109: [107], 111: [107], 113: [112, 110, 108, 107], 119: [85], 121: [120, 118],
        129: [54], 131: [130, 128], 140: [136], 142: [141, 126], 151: [147], 153: [152, 116],
    }
    for index, expected in routes.items():
        assert sources(index, layers[index]) == expected
    assert layers[119].options == {'layers': '85'} and layers[129].options == {'layers': '54'}
    assert [i for i, layer in enumerate(layers) if layer.name == 'yolo'] == [139, 150, 161]
    assert [i for i, layer in enumerate(layers) if layer.name == 'upsample'] == [118, 128]
    # `darknet partial yolov4.cfg yolov4.weights yolov4.conv.137 137` keeps layers 0 to 136.
    assert layers[136].module == 'neck.top_down_layers.1.4'
    assert layers[104].module == 'backbone.stage5.1.final_conv'
    assert all((layer.options['activation'] == 'mish') == layer.module.startswith('backbone.')
               for layer in layers if layer.module)


def test_full_size_network():
    """The weights file has the 257,717,640 bytes of the published yolov4.weights."""
    detector = build(tiny_config(widen_factor=1.0, deepen_factor=1.0, num_classes=80))
    sections = darknet_sections(detector, (608, 608))
    assert len(sections) == 163
    channels = channel_table(sections)
    assert channels['backbone.stem'] == (3, 32)
    assert channels['backbone.stage1.1.final_conv'] == (128, 64)
    assert channels['neck.reduce_layers.2.post_convs.0'] == (2048, 512)
    assert channels['bbox_head.head_module.convs_pred.2'] == (1024, 255)
    sizes = [array.size for array in darknet_parameters(detector)]
    assert 4 * sum(sizes) + 20 == 257717640
    first = [section for section in sections if section.name == 'yolo'][0]
    assert first.ints('mask') == [0, 1, 2] and first.integer('num') == 9
    assert first.options['anchors'].startswith('12,16,19,36,40,28,36,75')
    assert [section.number('scale_x_y') for section in sections
            if section.name == 'yolo'] == [1.2, 1.1, 1.05]


def test_every_parameter_is_in_the_table(tiny_model):
    keys = {key for key in tiny_model.state_dict() if not key.endswith('num_batches_tracked')}
    channels = channel_table(darknet_sections(tiny_model, SIZE))
    layers = match_layers(darknet_sections(tiny_model, SIZE))
    table = [key for layer in layers if layer.module
             for key in layer.parameter_shapes(channels[layer.module])]
    assert set(table) == keys and len(table) == len(keys)


def test_cfg_round_trip(tiny_sections):
    again = parse_cfg(format_cfg(tiny_sections))
    assert [(s.name, s.options) for s in again] == [(s.name, s.options) for s in tiny_sections]


def test_parse_ignores_comments_and_spaces():
    section, = parse_cfg('# comment\n; comment\n\n [ net ]\n width = 64 \n')
    assert section.name == 'net' and section.options == {'width': '64'} and section.line == 4


@pytest.mark.parametrize('text, message', [
    ('', 'does not begin with a section'),
    ('[convolutional]\nsize=3\n', 'does not begin with a section'),
    ('[net]\nwidth\n', "line 2 is 'width'"),
    ('width=3\n[net]\n', "line 1 is 'width=3'"),
])
def test_malformed_cfg(text, message):
    with pytest.raises(DarknetError, match=message):
        parse_cfg(text)


def _change(index, key, value):

    def change(sections):
        sections[index + 1].options[key] = value

    return change


@pytest.mark.parametrize('change, message', [
    (_change(0, 'size', '5'), r'layer 0, \[convolutional\] in line \d+, should have size=3, '
     'but has size=5'),
    (_change(0, 'activation', 'leaky'), 'should have activation=mish, but has activation=leaky'),
    (_change(1, 'stride', '1'), r'layer 1, .* should have stride=2, but has stride=1'),
    (_change(3, 'layers', '-1'), r'layer 3, \[route\] .* should have layers=1, .* layers=2'),
    (_change(3, 'groups', '2'), 'should have groups=1, but has groups=2'),
    (_change(7, 'from', '-2'), r'layer 7, \[shortcut\]'),
    (_change(0, 'filters', 'many'), 'filters=many must be whole numbers'),
    (_change(6, 'filters', '24'), r'layer 7, \[shortcut\] .* adds maps of 8 and 24 channels'),
    (lambda sections: sections.pop(), 'it ends before layer'),
    (lambda sections: sections.append(Section('yolo')), 'follows the last of the'),
    (lambda sections: sections.pop(4), r'layer 3 should be \[route\], but is \[convolutional\]'),
    (lambda sections: sections[1].options.pop('filters'), "has no option 'filters'"),
])
def test_cfg_of_another_network(tiny_sections, change, message):
    change(tiny_sections)
    with pytest.raises(DarknetError, match=message):
        channel_table(tiny_sections)


@pytest.mark.parametrize('change, message', [
    (_change(-3, 'filters', '25'), 'with 3 anchors and 3 classes needs 24'),
    (_change(-2, 'mask', '7,8,9'), 'does not fit the 18 numbers of anchors'),
    (_change(-2, 'classes', '4'), 'differs from the first'),
    (_change(-1, 'channels', '1'), 'only images of 3 channels'),
])
def test_network_that_cannot_be_built(tiny_sections, change, message):
    change(tiny_sections)
    with pytest.raises(DarknetError, match=message):
        model_config(tiny_sections)


def test_absolute_routes_are_the_same(tiny_sections):
    for index, section in enumerate(tiny_sections[1:]):
        if section.name == 'route':
            section.options['layers'] = ','.join(map(str, sources(index, section)))
    assert len(match_layers(tiny_sections)) == len(tiny_sections) - 1


@pytest.mark.parametrize('widen_factor, deepen_factor', [(0.125, 0.33), (0.1875, 0.67)])
def test_model_config_has_the_same_channels(widen_factor, deepen_factor):
    detector = build(tiny_config(widen_factor=widen_factor, deepen_factor=deepen_factor))
    again = build(model_config(darknet_sections(detector, SIZE)))
    shapes = [{key: value.shape for key, value in model.state_dict().items()}
              for model in (detector, again)]
    assert shapes[0] == shapes[1]


def test_options_of_the_head_survive():
    config = tiny_config()
    config['bbox_head'].update(
        match_iou_thr=0.3, ignore_iou_thr=0.6,
        bbox_coder=dict(type='mmgcp.YOLOv4BBoxCoder', scale_x_y=[1.3, 1.2, 1.0]),
        prior_generator=dict(
            type='mmdet.YOLOAnchorGenerator', strides=[8, 16, 32],
            base_sizes=[[(i + 0.5, i / 3) for i in range(j, j + 3)] for j in (1, 4, 7)]))
    head = build(config).bbox_head
    again = build(model_config(darknet_sections(build(config), SIZE))).bbox_head
    assert (again.match_iou_thr, again.ignore_iou_thr) == (0.3, 0.6)
    assert again.bbox_coder.scale_x_y == head.bbox_coder.scale_x_y
    assert again.prior_generator.base_sizes == head.prior_generator.base_sizes


def test_input_size_must_fit(tiny_model):
    with pytest.raises(DarknetError, match='100x64 is not a multiple of 32'):
        darknet_sections(tiny_model, (100, 64))


def test_small_variances_move_the_scale(tmp_path):
    """A variance below Darknet's epsilon cannot take up a smaller epsilon of the model."""
    model = build(tiny_config(eps=1e-7))
    norm = model.backbone.stem.bn
    with torch.no_grad():
        norm.running_var[0] = 1e-6
    write_darknet(model, tmp_path)
    arrays = darknet_parameters(model)
    _, scale, _, var = arrays[:4]
    assert (var > 0).all()
    factors = torch.from_numpy(scale) / (torch.from_numpy(var) + 1e-5).sqrt()
    expected = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(factors, expected.detach())

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the numbers and texts of Darknet's files may be, coming in and going out."""
import copy
import re
import struct
import time

import numpy as np
import pytest
import torch
from darknet_samples import READ, WRITE
from foreign_networks import pruned_sections, tiny_sections, write_network
from mmengine.config import Config
from scripts import complaint_of, output_of

from mmgcp.darknet import (
    DarknetError,
    check_names,
    check_numbers,
    class_names,
    format_cfg,
    input_size,
    model_config,
    parse_cfg,
    read_cfg,
    read_names,
    read_weights,
)
from mmgcp.darknet.base_network import Width
from mmgcp.darknet.from_darknet import _build_shallow
from mmgcp.darknet.matching import conv_channels
from mmgcp.utils.config import image_size

LONG = '9' * 5000


@pytest.fixture(scope='module')
def sections():
    return tiny_sections()


def changed(sections, name, **options):
    """A copy of sections, in which those of a name have other options."""
    sections = copy.deepcopy(sections)
    for section in sections:
        if section.name == name:
            section.options.update(options)
    return parse_cfg(format_cfg(sections))


@pytest.mark.parametrize('name, key, value, what', [
    *(('yolo', 'classes', value, 'must be from 1 to 2000') for value in (
        '0', '-1', '1000000', '2001')),
    *(('yolo', 'classes', value, 'must be whole numbers') for value in (
        LONG, '1e3', 'x', '3.0', '1_0', '٣', 'nan')),
    *(('net', key, value, 'must be from 32 to 8192') for key in ('width', 'height') for value in (
        '0', '-5', '1000000000', '8224')),
    ('net', 'width', '33', r'the input size 33x\d+ is not a multiple of 32'),
    ('net', 'height', '100', r'the input size \d+x100 is not a multiple of 32'),
    ('net', 'width', '1e9', 'must be whole numbers'),
    ('net', 'channels', '1', 'only images of 3 channels are supported'),
    ('net', 'channels', '-3', 'only images of 3 channels are supported'),
    ('net', 'channels', LONG, 'must be whole numbers'),
    *(('yolo', 'anchors', ','.join([value] * 18), what) for value, what in (
        ('nan', 'must be numbers'), ('inf', 'must be numbers'), ('1e400', 'must be numbers'),
        ('-1', 'must be from 0.001 to 100000'), ('0', 'must be from 0.001 to 100000'),
        ('1e9', 'must be from 0.001 to 100000'))),
    ('yolo', 'mask', '-1,0,1', 'must be from 0 to 1000'),
    ('yolo', 'mask', '99999,1,2', 'must be from 0 to 1000'),
    ('yolo', 'mask', '7,8,9', 'does not fit the 18 numbers of anchors'),
    *(('yolo', 'scale_x_y', value, what) for value, what in (
        ('nan', 'must be numbers'), ('0', 'must be from 0.1 to 10'), ('-1', 'must be from 0.1'),
        ('1e9', 'must be from 0.1 to 10'), ('1,2', 'must be one number'))),
    *(('yolo', key, value, what) for key in ('ignore_thresh', 'iou_thresh') for value, what in (
        ('nan', 'must be numbers'), ('-0.1', 'must be from 0 to 1'), ('1.5', 'must be from 0 to'))),
    ('convolutional', 'filters', LONG, 'must be whole numbers'),
    ('convolutional', 'size', LONG, 'should have size='),
    ('shortcut', 'from', LONG, 'must be whole numbers'),
])
def test_numbers_of_a_cfg(sections, name, key, value, what):
    before = time.process_time()
    with pytest.raises(DarknetError, match=what) as caught:
        check_numbers(changed(sections, name, **{key: value}))
    assert len(str(caught.value)) < 400 and '\n' not in str(caught.value)
    assert time.process_time() - before < 2


def test_numbers_at_their_bounds(sections):
    check_numbers(sections)
    for name, options in (('net', dict(width='32', height='8192')),
                          ('yolo', dict(anchors=','.join(['0.001', '100000'] * 9))),
                          ('yolo', dict(scale_x_y='10', ignore_thresh='0', iou_thresh='1'))):
        check_numbers(changed(sections, name, **options))


def test_too_many_sections():
    with pytest.raises(DarknetError, match='cfg has more than 2000 sections'):
        parse_cfg('[net]\n' + '[shortcut]\n' * 5000)
    with pytest.raises(DarknetError, match=r'no deepen_factor|not a YOLOv4 network'):
        model_config(parse_cfg('[net]\n' + '[shortcut]\n' * 1000))


def test_files_of_texts(tmp_path):
    cfg, _ = write_network(pruned_sections(2, low=1, high=4), tmp_path)
    expected = read_cfg(cfg)
    cfg.write_bytes(b'\xef\xbb\xbf' + cfg.read_bytes())  # a byte-order mark
    assert read_cfg(cfg) == expected
    cfg.write_bytes('# größer\n'.encode('latin1') + cfg.read_bytes()[3:])
    assert [section.name for section in read_cfg(cfg)] == [section.name for section in expected]
    cfg.write_bytes(b'[net]\n' + b'#' * 2**20)
    with pytest.raises(DarknetError, match='is not a Darknet cfg: it is larger than 1048576 bytes'):
        read_cfg(cfg)
    names = tmp_path / 'x.names'
    names.write_bytes(b'\xef\xbb\xbfcat\n\xc3\xa9 e\n')
    assert read_names(names) == ('cat', 'é e')
    names.write_bytes('größer'.encode('latin1'))
    with pytest.raises(DarknetError, match='is not a names file in UTF-8: byte 2 is 0xf6'):
        class_names(1, names)
    names.write_text('{{ fileDirname }}\n')
    with pytest.raises(DarknetError, match=r"the class name '\{\{ fileDirname \}\}', which can"):
        read_names(names)


@pytest.mark.parametrize('names, what', [
    ('abc', "must be a list, but are 'abc'"), (3, 'must be a list'), ({'a': 1}, 'must be a list'),
    (['a\nb'], r"'a\\nb', but it must be a text on one line"),
    (['a\r'], 'on one line'), (['a\u2028b'], 'on one line'), (['a\x85b'], 'on one line'),
    ([''], 'on one line'), ([' a'], 'without spaces around it'), ([b'a'], 'must be a text'),
    ([None], 'must be a text'), (['a\ud800'], 'cannot be written'), (['a\0'], 'cannot be written'),
    (['{{ x }}'], 'cannot be written')])
def test_class_names(names, what):
    with pytest.raises(DarknetError, match=f'^it has the class name.*{what}|of it {what}'):
        check_names(names, 'it')
    assert check_names(['a b', 'é', '中\u3000文'], 'it') == ('a b', 'é', '中\u3000文')


SHAPES = [('layer 0', {'a.bn.bias': (2, ), 'a.bn.running_var': (2, ), 'a.conv.weight': (2, 1)})]


@pytest.mark.parametrize('header, values, what', [
    ((0, 2, 5, 0), [1] * 6, None), ((0, 1, 0, 0), [1, 1, 0, 1, 1, 1], None),
    ((0, 2, 5, 0), [1, np.nan, 1, 1, 1, 1], 'layer 0 has values of its bias that are not finite'),
    ((0, 2, 5, 0), [1, 1, 1, np.inf, 1, 1], 'its running_var that are not finite'),
    ((0, 2, 5, 0), [1, 1, 1, 1, 1, -np.inf], 'its weight that are not finite'),
    ((0, 2, 5, 0), [1, 1, 1, -1, 1, 1], 'layer 0 has a variance of -1, with which outputs are not'),
    ((1001, 2, 5, 0), [1] * 6, 'its header has the version 1001.2'),
    ((0, -1, 5, 0), [1] * 6, 'its header has the version 0.-1'),
    ((0, 2, 5, -1), [1] * 6, 'its header counts -1 images')])
def test_weights(tmp_path, header, values, what):
    seen = struct.pack('<q' if header[0] * 10 + header[1] >= 2 else '<i', header[3])
    (tmp_path / 'x.weights').write_bytes(
        struct.pack('<3i', *header[:3]) + seen + np.array(values, '<f4').tobytes())
    if what is None:
        _, found = read_weights(tmp_path / 'x.weights', SHAPES)
        assert found['a.conv.weight'].flatten().tolist() == values[4:]
        return
    with pytest.raises(DarknetError, match=re.escape(what)):
        read_weights(tmp_path / 'x.weights', SHAPES)


@pytest.mark.parametrize('factor', [5 / 128, 0.25, 65 / 128, 1.5])
def test_widths_without_building_the_network(factor):
    narrow, half, built = (_build_shallow(value) for value in (1 / 128, 0.5, factor))
    for name, module in built.named_modules():
        if hasattr(module, 'conv') and hasattr(module, 'bn'):
            width = Width(conv_channels(narrow, name)[1], 2 * conv_channels(half, name)[1])
            assert width.filters(factor) == conv_channels(built, name)[1], name


def test_little_files_take_little(tmp_path, monkeypatch):
    """A wide layer in a small network: what it may have been pruned from is not built."""
    sections = pruned_sections(5, low=1, high=4)
    sections[1].options['filters'] = '64'  # widen_factor 1.8
    model_config(sections)  # which builds two shallow networks once

    def refuse(*args):
        raise AssertionError

    monkeypatch.setattr('mmgcp.darknet.from_darknet.build_detector', refuse)
    assert model_config(sections)['backbone']['widen_factor'] == 225 / 128


def test_nul_in_a_path(tmp_path):
    cfg, weights = write_network(pruned_sections(2, low=1, high=4), tmp_path)
    for arguments in ((cfg, weights, 'a\0b.pth'), ('a\0b', weights, 'x.pth'),
                      (cfg, 'a\0b', 'x.pth')):
        assert complaint_of(READ, *arguments, cwd=tmp_path).startswith('darknet_to_mmgcp.py: the ')


@pytest.fixture(scope='module')
def converted(tmp_path_factory):
    """Config and checkpoint of a converted network."""
    folder = tmp_path_factory.mktemp('bounds')
    files = write_network(pruned_sections(2, low=1, high=4), folder)
    output_of(READ, *files, folder / 'net.pth')
    return folder / 'net.py', torch.load(folder / 'net.pth')


def with_meta(**meta):
    return lambda content: content['meta'].update(meta)


@pytest.mark.parametrize('change, what', [
    (with_meta(dataset_meta=dict(classes=('a', 'b', 'c\nd'))), r"the class name 'c\\nd', but it"),
    (with_meta(dataset_meta=dict(classes='abc')), "must be a list, but are 'abc'"),
    (with_meta(dataset_meta=dict(CLASSES=('a', ))), 'names 1 classes, but the model has 3'),
    (with_meta(dataset_meta='voc'), 'dataset_meta of the checkpoint .* must be a dictionary'),
    (with_meta(darknet=dict(seen='7')), 'must have a number of images'),
    (with_meta(darknet=dict(seen=-1)), 'must have a number of images'),
    (with_meta(darknet=dict(seen=2**63)), 'must have a number of images'),
    (with_meta(darknet=[1]), 'must have a number of images'),
    (lambda content: content.update(meta='x'), 'meta of the checkpoint .* must be a dictionary'),
    (lambda content: content['state_dict'].update({
        'backbone.stem.conv.weight': content['state_dict']['backbone.stem.conv.weight'].double()
        * 0 + 1e300}), 'not finite'),
])
def test_odd_checkpoints_going_out(converted, tmp_path, change, what):
    config, content = converted
    content = dict(content, meta=dict(content['meta']), state_dict=dict(content['state_dict']))
    change(content)
    torch.save(content, str(tmp_path / 'odd.pth'))
    message = complaint_of(WRITE, config, tmp_path / 'odd.pth', tmp_path / 'out')
    assert re.search(what, message), message
    assert [path.name for path in tmp_path.iterdir()] == ['odd.pth']


@pytest.mark.parametrize('meta', [None, {}, dict(dataset_meta=None, darknet=None)])
def test_checkpoints_without_a_description_going_out(converted, tmp_path, meta):
    config, content = converted
    torch.save(dict(content, meta=meta), str(tmp_path / 'odd.pth'))
    output_of(WRITE, config, tmp_path / 'odd.pth', tmp_path / 'out')
    assert (tmp_path / 'out.names').read_text() == 'class_0\nclass_1\nclass_2\n'


@pytest.mark.parametrize('size', [(96, 64), (320, 224)])
def test_input_size_is_what_the_test_pipeline_makes(size):
    """Whatever the img_scale of a base config says."""
    dataset = dict(pipeline=[dict(type='LetterResize', scale=size)])
    config = Config(dict(img_scale=(640, 640), test_dataloader=dict(dataset=dataset)))
    assert input_size(config) == image_size(config) == size
    config.pop('test_dataloader')
    assert input_size(config) == image_size(config) == (640, 640)


def test_input_size_that_nobody_says():
    with pytest.raises(DarknetError, match='does not say the input size: give --input-size'):
        input_size(Config(dict(test_pipeline=[dict(type='LoadImageFromFile')])))


@pytest.mark.parametrize('size', [(0, 0), (-32, -32), (32, 33), (8224, 32)])
def test_input_sizes_going_out(converted, tmp_path, size):
    config, content = converted
    torch.save(content, str(tmp_path / 'x.pth'))
    message = complaint_of(WRITE, config, tmp_path / 'x.pth', tmp_path / 'out',
                           '--input-size', *size)
    assert re.search(r'is not a multiple of 32|must be from 32 to 8192', message)
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Reading networks that other programs pruned, and writing them again."""
import re
import shutil

import numpy as np
import pytest
import torch
from darknet_samples import READ, SIZE, WRITE, build, tiny_config
from foreign_networks import pruned_sections, tiny_sections, write_network
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmyolo.models import YOLODetector
from opencv_darknet import assert_agrees, needs_opencv_4
from scripts import complaint_of, output_of

from mmgcp.darknet import (
    DarknetError,
    Section,
    channel_table,
    darknet_sections,
    format_cfg,
    model_config,
    parse_cfg,
)
from mmgcp.darknet.base_network import find_widen_factor
from mmgcp.pruning import count_channels

NETWORKS = {  # name: random seed, limits of the filters, arguments of tiny_config
    'narrow': (1, dict(low=1, high=9)),
    'uneven': (2, dict(low=3, high=24)),
    'deeper': (3, dict(low=8, high=25, deepen_factor=0.67)),
    'other classes': (4, dict(low=4, high=16, num_classes=5)),
}


@pytest.fixture(scope='module', params=list(NETWORKS))
def network(request, tmp_path_factory):
    """Folder with a network pruned elsewhere as Darknet's files."""
    seed, kwargs = NETWORKS[request.param]
    folder = tmp_path_factory.mktemp('elsewhere')
    write_network(pruned_sections(seed, **kwargs), folder, seed)
    return folder


def convert(folder, out, *args):
    """Return what the tool prints and the detector."""
    printed = output_of(READ, folder / 'net.cfg', folder / 'net.weights', out / 'pruned.pth', *args)
    return printed, init_detector(str(out / 'pruned.py'), str(out / 'pruned.pth'), device='cpu')


@needs_opencv_4
def test_there_and_back(network, tmp_path):
    printed, detector = convert(network, tmp_path)
    assert 'pruned' in printed
    assert type(detector) is YOLODetector
    assert {path.name for path in tmp_path.iterdir()} == {'pruned.py', 'pruned.pth'}
    assert_agrees(detector, network / 'net.cfg', network / 'net.weights')

    output_of(WRITE, tmp_path / 'pruned.py', tmp_path / 'pruned.pth',
             tmp_path / 'back')
    back = tmp_path / 'back.cfg', tmp_path / 'back.weights'
    assert_agrees(detector, *back)
    assert back[0].read_text() == (network / 'net.cfg').read_text()
    assert back[1].read_bytes() == (network / 'net.weights').read_bytes()


def test_config_is_complete(tmp_path):
    """The config and the checkpoint are all that another folder needs."""
    write_network(pruned_sections(5), tmp_path)
    first, second = tmp_path / 'first', tmp_path / 'second'
    first.mkdir()
    convert(tmp_path, first)
    shutil.move(str(first), str(second))

    cfg = Config.fromfile(second / 'pruned.py')
    assert cfg.load_from == str(second / 'pruned.pth') and not cfg.resume
    assert cfg.model.type == 'mmgcp.PrunedDetector'
    assert cfg.model.detector == 'mmyolo.YOLODetector'
    assert cfg.custom_imports.imports == ['mmgcp'] and cfg.default_scope == 'mmyolo'
    model = build(cfg.model)
    checkpoint = torch.load(cfg.load_from)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert checkpoint['meta']['darknet']['seen'] == 11
    detector = init_detector(cfg, cfg.load_from, device='cpu')
    image = np.random.RandomState(0).randint(0, 255, (48, 70, 3), dtype=np.uint8)
    assert len(inference_detector(detector, image).pred_instances) > 0


def test_config_loads_the_checkpoint_beside_it(tmp_path):
    """Whatever its name is."""
    cfg, weights = write_network(pruned_sections(5), tmp_path)
    output_of(READ, cfg, weights, tmp_path / 'small.v2.pth')
    config = Config.fromfile(tmp_path / 'small.v2.py')
    assert config.load_from == str(tmp_path / 'small.v2.pth')


def test_model_can_be_trained(tmp_path):
    model = build(model_config(pruned_sections(6))).train()
    targets = torch.tensor([[0, 1, 10., 10, 40, 50], [1, 2, 5., 20, 60, 60]])
    losses = model(torch.rand(2, 3, SIZE[1], SIZE[0]),
                   dict(bboxes_labels=targets, img_metas=[{}, {}]), mode='loss')
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_only_changed_layers_are_listed():
    sections = tiny_sections()
    sections[3].options['filters'] = '5'  # of 8, the short path of the first stage
    config = model_config(sections)
    assert config['channels'] == {
        'backbone.stage1.1.short_conv.conv': [None, 5],
        'backbone.stage1.1.short_conv.bn': [5],
        'backbone.stage1.1.final_conv.conv': [13, None]
    }
    assert config['backbone']['widen_factor'] == 0.125
    counts = count_channels(build(config))
    assert {name: counts[name] for name in config['channels']} == {
        'backbone.stage1.1.short_conv.conv': [8, 5], 'backbone.stage1.1.short_conv.bn': [5],
        'backbone.stage1.1.final_conv.conv': [13, 8]}


def test_classes_and_anchors_are_carried_over(tmp_path):
    sections = pruned_sections(7, num_classes=5)
    anchors = [float(number) + 0.25 for number in range(18)]
    for scale, section in zip((1.3, 1.15, 1.0), (s for s in sections if s.name == 'yolo')):
        section.options.update(anchors=','.join(map(str, anchors)), scale_x_y=str(scale),
                               ignore_thresh='0.6', iou_thresh='0.3')
    write_network(sections, tmp_path)
    names = tmp_path / 'five.names'
    names.write_text('a\nb\nc\nd\ne e\n')
    _, detector = convert(tmp_path, tmp_path, '--names', names)
    head = detector.bbox_head
    assert detector.dataset_meta['classes'] == ('a', 'b', 'c', 'd', 'e e')
    assert head.num_classes == 5 and (head.ignore_iou_thr, head.match_iou_thr) == (0.6, 0.3)
    sizes = [tuple(size) for level in head.prior_generator.base_sizes for size in level]
    assert sizes == list(zip(anchors[::2], anchors[1::2]))
    assert head.bbox_coder.scale_x_y == {8: 1.3, 16: 1.15, 32: 1.0}

    output_of(WRITE, tmp_path / 'pruned.py', tmp_path / 'pruned.pth',
             tmp_path / 'back')
    assert (tmp_path / 'back.names').read_text() == names.read_text()
    assert channel_table(sections)['bbox_head.head_module.convs_pred.2'][1] == 30


def set_one(sections, index, filters):
    sections[index + 1].options['filters'] = str(filters)
    return sections


def build_base(widen_factor):
    return build(tiny_config(widen_factor=widen_factor))


@pytest.mark.parametrize('eighths', [1, 3, 11, 16, 43])
def test_unpruned_networks_stay_plain(eighths):
    """An eighth of a widen_factor is 1 / 128, that is 8 channels of the last stage."""
    config = model_config(tiny_sections(widen_factor=eighths / 128))
    assert config['type'] == 'YOLODetector' and 'channels' not in config
    assert config['backbone']['widen_factor'] == eighths / 128


@pytest.mark.parametrize('index, filters, expected', [
    (0, 8, 0.125),
    (0, 9, 33 / 128),  # of 32 at full width: 9 take 16, the first of which come above 8 / 32
    (0, 40, 129 / 128),
    (0, 64, 225 / 128),
])
def test_base_is_as_narrow_as_possible(index, filters, expected):
    sections = set_one(tiny_sections(), index, filters)
    assert find_widen_factor(sections, build_base) == expected


def test_base_is_wide_enough_and_no_wider():
    sections = pruned_sections(10, low=1, high=17)
    factor = find_widen_factor(sections, build_base)
    assert factor <= 64 / 128

    def fits(widen_factor):
        base = darknet_sections(build_base(widen_factor), SIZE)
        return all(ours.integer('filters') <= theirs.integer('filters')
                   for ours, theirs in zip(sections, base) if ours.name == 'convolutional')

    assert fits(factor) and not fits(factor - 1 / 128)


def test_wider_than_yolov4():
    """A layer with more filters than YOLOv4 has at full width."""
    detector = build(model_config(set_one(tiny_sections(), 0, 33)))
    assert detector.backbone.stem.conv.weight.shape == (33, 3, 3, 3)
    assert detector.backbone.stage1[0].conv.weight.shape == (8, 33, 3, 3)


def _other_depth():
    model = build(tiny_config())
    model.backbone.stage3[1].blocks = model.backbone.stage3[1].blocks[:2]
    return darknet_sections(model, SIZE)


def _without(index):
    sections = pruned_sections(8)
    sections.pop(index + 1)
    return sections


def _predictions(index, **options):
    sections = pruned_sections(8)
    sections[index].options.update(options)
    return sections


@pytest.mark.parametrize('sections, message', [
    (lambda: set_one(pruned_sections(8), 6, 99), r'layer 7, \[shortcut\] in line \d+, adds maps '
     r'of \d+ and 99 channels'),
    (lambda: set_one(pruned_sections(8), 2, 0), 'layer 2, .* has 0 filters'),
    (lambda: set_one(pruned_sections(8), 2, -5), 'layer 2, .* has -5 filters'),
    (lambda: set_one(pruned_sections(8), 0, 200), r'layer 0, \[convolutional\] in line \d+, has '
     r'200 filters, .* 6\.\d+ times as wide'),
    (lambda: set_one(pruned_sections(8), 0, 10**30), 'layer 0, .* times as wide'),
    (lambda: _without(8), 'not a YOLOv4 network: layer 8 should be'),
    (lambda: _without(7), 'not a YOLOv4 network'),
    (lambda: pruned_sections(8)[:-1], 'it ends before layer'),
    (_other_depth, r'no deepen_factor gives stages of \[1, 1, 2, 3, 1\] residual blocks'),
    (lambda: _predictions(-1, classes='4'), 'differs from the first'),
    (lambda: _predictions(-2, filters='25'), 'needs 24'),
    (lambda: pruned_sections(8) + [Section('yolo')], 'follows the last'),
])
def test_networks_that_are_refused(sections, message):
    with pytest.raises(DarknetError, match=message) as info:
        model_config(parse_cfg(format_cfg(sections())))
    assert '\n' not in str(info.value)


def test_errors_write_nothing(tmp_path):
    cfg, weights = write_network(pruned_sections(9), tmp_path)
    content = weights.read_bytes()
    last = 4 * 24 * (1 + channel_table(pruned_sections(9))[
        'bbox_head.head_module.convs_pred.2'][0])
    files = dict(
        short=content[:-10],  # ends inside the last layer
        partial=content[:-last],  # ends before the last layer
        long=content + bytes(4))
    for name, part in files.items():
        (tmp_path / f'{name}.weights').write_bytes(part)
    faulty, wide = tmp_path / 'faulty.cfg', tmp_path / 'wide.cfg'
    faulty.write_text(format_cfg(set_one(pruned_sections(9), 6, 99)))
    wide.write_text(format_cfg(set_one(pruned_sections(9), 0, 10**30)))
    (tmp_path / 'two.names').write_text('a\nb\n')
    (tmp_path / 'out.py').write_text('# older')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    out = tmp_path / 'out.pth'
    for args, message in [
        ((cfg, tmp_path / 'short.weights', out), 'short.weights ends inside layer'),
        ((cfg, tmp_path / 'partial.weights', out), r'ends before layer \d+, .*convs_pred.2.*: the '
         'network has been pruned, so its weights must be complete'),
        ((cfg, tmp_path / 'long.weights', out), 'has 4 bytes left over'),
        ((faulty, weights, out), r'faulty.cfg: layer 7, \[shortcut\]'),
        ((wide, weights, out), 'ends inside layer 0|times as wide'),
        ((cfg, weights, out, '--names', tmp_path / 'two.names'), 'has 2 names'),
    ]:
        assert re.search(message, complaint_of(READ, *args))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from meta_device import on_meta
from mmengine.config import Config
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import DefaultScope

import mmgcp  # noqa: F401
from mmgcp.errors import UserError
from mmgcp.utils.config import (
    at_width,
    build_detector,
    check_layout,
    drop_pretrained,
    image_size,
    load_config,
    replace_scale,
    section,
)

COCO_CONFIG = (Path(__file__).parents[2] / 'configs' / 'yolov4' /
               'yolov4_syncbn_fast_8xb16-300e_coco.py')


@pytest.fixture
def write(tmp_path):

    def write_text(text, name='config.py'):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write_text


def test_file(write):
    cfg = load_config(write("model = dict(type='A', width=3)\nepochs = 5\n"))
    assert cfg.model == dict(type='A', width=3) and cfg.epochs == 5


def test_options(write):
    options = {'model.width': 7, 'train_cfg': dict(max_epochs=2), 'model.neck.depth': 1}
    cfg = load_config(write("model = dict(type='A', width=3)\n"), options)
    assert cfg.model == dict(type='A', width=7, neck=dict(depth=1))
    assert cfg.train_cfg.max_epochs == 2


def test_options_may_bring_the_model(write):
    assert load_config(write('epochs = 5\n'), {'model.type': 'A'}).model.type == 'A'


@pytest.mark.parametrize('options, reason', [
    ({'epochs.warmup': 1}, "epochs={'warmup': 1} in child config cannot inherit from base"),
    ({'model.layers.7.width': 1}, 'Index 7 exceeds the length of list'),
    ({'model.layers.width': 1}, 'list indices must be integers'),
    ({'model.layers.0': 1}, "'int' object has no attribute 'items'"),
])
def test_options_that_do_not_fit(write, options, reason):
    path = write("model = dict(type='A', layers=[dict(width=3)])\nepochs = 5\n")
    (key, value), = options.items()
    with pytest.raises(UserError) as caught:
        load_config(path, options)
    message = str(caught.value)
    assert message.startswith(f'the options {key}={value} do not fit the config {path}: {reason}')
    assert len(message.splitlines()) == 1


def test_config_of_a_package():
    cfg = load_config('mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py')
    assert cfg.model.bbox_head.type == 'YOLOv5Head'


def test_base(write):
    write("model = dict(type='A', width=3)\n", 'base.py')
    cfg = load_config(write("_base_ = './base.py'\nmodel = dict(width=4)\n"))
    assert cfg.model == dict(type='A', width=4)


@pytest.mark.parametrize('path', ['nowhere.py', 'no/folder/config.py'])
def test_missing(path):
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f'there is no config {path}'


def test_folder(tmp_path):
    with pytest.raises(UserError, match='^there is no config '):
        load_config(str(tmp_path))


def test_missing_in_a_package():
    with pytest.raises(UserError, match='mmyolo::yolov5/nothing.py') as caught:
        load_config('mmyolo::yolov5/nothing.py')
    assert len(str(caught.value).splitlines()) == 1


def test_missing_package():
    with pytest.raises(UserError, match='nopackage::config.py'):
        load_config('nopackage::config.py')


def test_missing_base(write):
    path = write("_base_ = './nowhere.py'\nmodel = dict(type='A')\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f'the config {path} needs a file that does not exist: ')
    assert 'nowhere.py' in message[len(path) + 20:] and len(message.splitlines()) == 1


@pytest.mark.parametrize('text, error', [
    ('model = dict(\n', 'SyntaxError'),
    ('model = undefined_name\n', 'NameError'),
    ('model = dict(width=1 / 0)\n', 'ZeroDivisionError'),
    ("custom_imports = dict(imports=['no_such_package'])\nmodel = dict(type='A')\n",
     'ImportError'),
])
def test_faulty(write, text, error):
    path = write(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f'the config {path} cannot be read: {error}: ')
    assert len(message.splitlines()) == 1
    assert sys.path[-1] not in message  # MMEngine lists the folders in which it has looked


def test_without_model(write):
    path = write('train_cfg = dict(max_epochs=3)\n')
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert str(caught.value) == f'the config {path} describes no model'


@pytest.mark.parametrize('num_classes, parameters', [(80, 64_363_101), (20, 64_040_001)])
def test_published_size(num_classes, parameters):
    """The sizes of Darknet's yolov4.cfg and its variant for PASCAL VOC."""
    cfg = load_config(str(COCO_CONFIG), {'model.bbox_head.head_module.num_classes': num_classes})
    with on_meta():
        detector = build_detector(cfg)
        assert sum(parameter.numel() for parameter in detector.parameters()) == parameters
        cls_scores, bbox_preds, objectnesses = detector(torch.empty(1, 3, 64, 96), mode='tensor')
    assert [tuple(item.shape) for item in (*cls_scores, *bbox_preds, *objectnesses)] == [
        (1, channels, 64 // stride, 96 // stride)
        for channels in (3 * num_classes, 12, 3) for stride in (8, 16, 32)
    ]


def test_batch_norm_is_not_synchronised():
    cfg = load_config(str(COCO_CONFIG))
    assert cfg.model.backbone.norm_cfg.type == 'SyncBN'
    with on_meta():
        detector = build_detector(cfg)
    kinds = [type(module).__name__ for module in detector.modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(kinds) == 107 and 'SyncBatchNorm' not in kinds
    assert detector.training


def test_scope_is_left_alone():
    """A detector of MMYOLO is built whatever the scope around, which stays."""
    cfg = Config(dict(model=dict(
        type='YOLOv5CSPDarknet', widen_factor=0.125, deepen_factor=0.33)))
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert type(build_detector(cfg)).__name__ == 'YOLOv5CSPDarknet'
        assert DefaultScope.get_current_instance().scope_name == 'mmdet'


def test_scale():
    """Sizes and their negative halves change everywhere, other pairs of numbers stay."""
    pipeline = [
        dict(type='Mosaic', img_scale=(64, 48), pre_transform=[dict(scale=[64, 48], other=(8, 8))]),
        dict(type='YOLOv5RandomAffine', border=(-32, -24)), dict(type='mmdet.Albu')]
    before = copy.deepcopy(pipeline)
    assert replace_scale(dict(pipeline=pipeline), (64, 48), (32, 16)) == dict(pipeline=[
        dict(type='Mosaic', img_scale=(32, 16), pre_transform=[dict(scale=(32, 16), other=(8, 8))]),
        dict(type='YOLOv5RandomAffine', border=(-16, -8))])
    assert pipeline == before


def test_drop_pretrained():
    """Initialisations from checkpoints go, wherever they are and however they are written."""
    kaiming = dict(type='Kaiming', layer='Conv2d')
    content = dict(
        init_cfg=dict(type='Pretrained', checkpoint='a.pth'),
        backbone=dict(type='X', pretrained='torchvision://resnet50', init_cfg=kaiming),
        timm=dict(type='TIMMBackbone', pretrained=True),
        necks=[dict(init_cfg=[kaiming, dict(type='Pretrained', checkpoint='b.pth')]),
               dict(init_cfg=dict(type=PretrainedInit, checkpoint='c.pth')),
               dict(init_cfg=dict(type='mmengine.model.weight_init.PretrainedInit',
                                  checkpoint='d.pth')), dict(pretrained=None, init_cfg=None)])
    drop_pretrained(content)
    assert content == dict(
        backbone=dict(type='X', pretrained=None, init_cfg=kaiming),
        timm=dict(type='TIMMBackbone', pretrained=False),
        necks=[dict(init_cfg=[kaiming]), {}, {}, dict(pretrained=None, init_cfg=None)])


def test_section():
    cfg = Config(dict(train_cfg=dict(max_epochs=3), val_cfg=None, test_cfg=3))
    assert section(cfg, 'train_cfg') == dict(max_epochs=3)
    assert section(cfg, 'val_cfg') == {} and section(cfg, 'optim_wrapper') == {}
    with pytest.raises(UserError, match='^test_cfg of the config must be a dict, but is 3$'):
        section(cfg, 'test_cfg')


def test_layout_of_configs(monkeypatch):
    """As with yapf 0.43 and MMEngine before 0.10."""
    check_layout()

    def refuse(text, **settings):
        raise TypeError("FormatCode() got an unexpected keyword argument 'verify'")

    monkeypatch.setattr('mmengine.config.config.FormatCode', refuse)
    with pytest.raises(UserError, match="cannot write configs with the installed yapf .*'verify'.*"
                       "pip install 'yapf<0.40.2'"):
        check_layout()


RESIZE = 'mmdet.FixShapeResize'


@pytest.mark.parametrize('step, width, size', [
    (dict(type='LetterResize', scale=(640, 640)), 320, (320, 320)),
    (dict(type=RESIZE, width=640, height=640, keep_ratio=False), 96, (96, 96)),
    (dict(type='mmdet.Resize', scale=(1333, 800)), 640, (640, 384)),
    (dict(type='mmdet.Resize', scale=(1333, 800)), 32, (32, 32)),
])
def test_images_of_another_width(step, width, size):
    """The height follows, in multiples of 32; batches have no shapes of their own."""
    dataset = dict(pipeline=[step], batch_shapes_cfg=dict(img_size=640))
    cfg = Config(dict(val_dataloader=dict(dataset=dataset), test_dataloader=dict(dataset=dataset)))
    found = at_width(cfg, width)
    assert image_size(found) == size
    assert found.val_dataloader.dataset == dict(
        pipeline=found.test_dataloader.dataset.pipeline, batch_shapes_cfg=None)
    assert cfg.val_dataloader.dataset.pipeline == [step]


def test_images_whose_width_is_not_said():
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[dict(type='Normalize')]))))
    with pytest.raises(UserError, match='cannot be made 320 pixels wide: .* that they are 640'):
        at_width(cfg, 320)


def test_image_size_of_a_config_that_is_none():
    with pytest.raises(UserError, match='test_dataloader of the config must be a dict, but is 3'):
        image_size(Config(dict(test_dataloader=3)))
    assert image_size(Config(dict(test_dataloader=dict(dataset=3)))) == (640, 640)


RESIZE = dict(type='YOLOv5KeepRatioResize', scale=(96, 64))


@pytest.mark.parametrize('pipeline, size', [
    ([RESIZE, dict(type='mmdet.LoadAnnotations')], (96, 64)),
    ([RESIZE, dict(type='LetterResize', scale=(416, 320))], (416, 320)),
    ([RESIZE, dict(type='mmdet.Pad', size=(128, 96))], (128, 96)),
    ([RESIZE, dict(type='mmdet.Pad', size_divisor=32)], (96, 64)),
    ([dict(type='mmdet.FixShapeResize', width=320, height=256)], (320, 256)),
    ([dict(type='Resize', scale=224)], (224, 224)),
    ([dict(type='LoadImageFromFile')], (640, 480)),
])
@pytest.mark.parametrize('wrapped', [False, True])
def test_size_of_images_is_what_the_test_pipeline_makes(pipeline, size, wrapped):
    """Also where the img_scale of a base config says something else."""
    dataset = dict(type='A', pipeline=pipeline)
    if wrapped:
        dataset = dict(type='ConcatDataset', datasets=[dataset])
    assert image_size(Config(dict(img_scale=(640, 480),
                                  test_dataloader=dict(dataset=dataset)))) == size


def test_size_of_images_without_a_test_pipeline():
    assert image_size(Config(dict(img_scale=(320, 256)))) == (320, 256)
    assert image_size(Config(dict(test_dataloader=None))) == (640, 640)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of detectors: do their parts fit each other?"""
import math
from pathlib import Path

import pytest
import torch
from meta_device import on_meta
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmyolo.registry import HOOKS, TRANSFORMS
from mmyolo.utils import register_all_modules
from torch.nn.modules.batchnorm import _BatchNorm

import mmgcp  # noqa: F401
from mmgcp.nn.lookup import find_module
from mmgcp.pruning import LayerGroup
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.utils.config import build_detector

ROOT = Path(__file__).parents[1] / 'configs'
# The stages are tested in tests/test_example_configs.py, and pruning and SSDs in
# tests/test_pruning/test_prune_configs.py
STAGES = ('sparse', 'prune', 'finetune', 'distill')
OTHERS = {'_base_', 'ssd'}
PATHS = sorted(path for path in ROOT.rglob('*.py')
               if not OTHERS & set(path.relative_to(ROOT).parts)
               and path.stem.rsplit('_', 1)[-1] not in STAGES)
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


@pytest.fixture(scope='module', params=[str(path.relative_to(ROOT)) for path in PATHS])
def cfg(request):
    register_all_modules(init_default_scope=False)
    return Config.fromfile(str(ROOT / request.param))


@pytest.fixture(scope='module')
def detector(cfg):
    with on_meta():
        return build_detector(cfg)


def list_datasets(dataset):
    """The datasets behind wrappers."""
    if 'datasets' in dataset:
        return [inner for item in dataset.datasets for inner in list_datasets(item)]
    return list_datasets(dataset.dataset) if 'dataset' in dataset else [dataset]


def test_there_are_configs():
    assert len(PATHS) >= 4


def test_detector(cfg, detector):
    """It predicts on three levels, or one more, for the classes of the data."""
    strides = (4, 8, 16, 32) if '-p2' in Path(cfg.filename).stem else (8, 16, 32)
    width, height = cfg.img_scale
    with on_meta():
        outputs = detector(torch.empty(1, 3, height, width), mode='tensor')
    cells = [(height // stride, width // stride) for stride in strides]
    num_classes = cfg.model.bbox_head.head_module.num_classes
    for kind, channels in zip(outputs, (3 * num_classes, 12, 3)):
        assert [tuple(level.shape) for level in kind] == [(1, channels, *size) for size in cells]


def test_classes_of_the_data(cfg):
    num_classes = cfg.model.bbox_head.head_module.num_classes
    for name in LOADERS:
        for dataset in list_datasets(cfg[name].dataset):
            if 'metainfo' in dataset:
                assert len(dataset.metainfo.classes) == num_classes
            else:
                usual = dict(YOLOv5CocoDataset=80, YOLOv5VOCDataset=20)
                assert usual[dataset.type] == num_classes


def test_loss_weights(cfg):
    """MMYOLO's rules: that of objectness by the image's area, for YOLOv5 the classes' number."""
    head = cfg.model.bbox_head
    if 'demo' in Path(cfg.filename).stem:  # has weights of its own
        weights = [head[name].loss_weight for name in ('loss_cls', 'loss_bbox', 'loss_obj')]
        assert weights == [0.25, 0.1, 0.25]
        return
    assert head.loss_bbox.loss_weight == 0.05
    share = head.head_module.num_classes / 80 if head.type == 'YOLOv5Head' else 1
    assert math.isclose(head.loss_cls.loss_weight, 0.5 * share)
    assert math.isclose(head.loss_obj.loss_weight, (cfg.img_scale[0] / 640)**2)


def test_pipelines(cfg):
    with DefaultScope.overwrite_default_scope('mmyolo'):
        for name in LOADERS:
            for dataset in list_datasets(cfg[name].dataset):
                assert len(dataset.pipeline) >= 5
                for transform in dataset.pipeline:
                    assert callable(TRANSFORMS.build(transform)), transform


def test_image_sizes(cfg):
    """All transforms work on img_scale."""
    size = tuple(cfg.img_scale)
    for dataset in list_datasets(cfg.train_dataloader.dataset):
        if not any(transform.type == 'Mosaic' for transform in dataset.pipeline):
            assert [tuple(transform.scale) for transform in dataset.pipeline
                    if transform.type == 'LetterResize'] == [size]
            continue
        for transform in dataset.pipeline:
            if transform.type == 'Mosaic':
                assert tuple(transform.img_scale) == size
            if transform.type == 'YOLOv5RandomAffine':
                assert tuple(transform.border) == (-size[0] // 2, -size[1] // 2)
    for dataset in list_datasets(cfg.test_dataloader.dataset):
        scales = [tuple(transform.scale) for transform in dataset.pipeline
                  if transform.type in ('YOLOv5KeepRatioResize', 'LetterResize')]
        assert scales == [size, size]
        if dataset.get('batch_shapes_cfg'):
            assert dataset.batch_shapes_cfg.img_size == size[0]


def test_test_and_validation_are_alike(cfg):
    assert cfg.test_dataloader == cfg.val_dataloader
    assert cfg.test_evaluator == cfg.val_evaluator
    assert all(dataset.test_mode for dataset in list_datasets(cfg.test_dataloader.dataset))


def test_schedule(cfg):
    hook = cfg.default_hooks.param_scheduler
    assert cfg.max_epochs == cfg.train_cfg.max_epochs == hook.max_epochs
    assert not cfg.get('param_scheduler')  # beside the hook it would be a second one
    assert cfg.train_cfg.max_epochs % cfg.train_cfg.val_interval == 0
    assert 0 < hook.lr_factor < 1
    with DefaultScope.overwrite_default_scope('mmyolo'):
        assert type(HOOKS.build(hook)).__name__ == 'YOLOv5ParamSchedulerHook'


def test_optimizer(cfg):
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.batch_size_per_gpu == cfg.train_dataloader.batch_size
    assert optimizer.lr == cfg.base_lr > 0
    assert cfg.optim_wrapper.constructor == 'YOLOv5OptimizerConstructor'


def test_best_checkpoint_is_of_a_known_metric(cfg):
    best = cfg.default_hooks.checkpoint.get('save_best')
    prefix = dict(VOCMetric='pascal_voc/', CocoMetric='coco/')
    if best and best != 'auto':
        assert best.startswith(prefix[cfg.val_evaluator.type.split('.')[-1]])


def test_collate_function(cfg):
    """MMEngine cannot call a function whose config has a scope."""
    for name in LOADERS:
        assert '_scope_' not in cfg[name].get('collate_fn', {})
    assert cfg.train_dataloader.collate_fn.type == 'yolov5_collate'


def test_layer_groups(cfg, detector):
    """Each pattern means something, and no normalised convolution is left out."""
    groups = [LayerGroup(**group) for group in cfg.prune_cfg.groups]
    layers = [name for name, module in detector.named_modules()
              if isinstance(module, _BatchNorm)]
    assigned = assign_groups(detector, layers, groups)
    assert set(assigned) == set(layers)
    assert {group.name for group in assigned.values()} == {group.name for group in groups}
    assert 0 < cfg.prune_cfg.target_params < 1


def test_attention_groups(cfg, detector):
    for group in cfg.attention_groups:
        assert group.weight > 0 and len(group.layers) > 0
        for layer in group.layers:
            find_module(detector, layer)


def test_import(cfg):
    assert 'mmgcp' in cfg.custom_imports.imports

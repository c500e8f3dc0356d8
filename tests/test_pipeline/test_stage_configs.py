# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from pathlib import Path

import pytest
from mmengine.config import Config

from mmgcp.datasets import VOCInfo
from mmgcp.pipeline.stage_configs import baseline_config, distill_config, sparse_config
from mmgcp.utils.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = str(CONFIGS / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py')
PLAIN = 'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'


def make_voc(splits, classes=('cat', "cow's", 'dog', 'eel', 'fox', 'gnu')):
    return VOCInfo(
        root=Path('/data/my pets'), splits=splits, classes=list(classes), num_images=9,
        num_objects={name: 1 for name in classes})


@pytest.fixture
def baseline(tmp_path):
    """A function that writes baseline.py and reads it."""

    def write(config=SMALL, epochs=7, voc=None, options=None):
        text = baseline_config(config, load_config(config), epochs, voc, options or {})
        (tmp_path / 'baseline.py').write_text(text)
        return Config.fromfile(str(tmp_path / 'baseline.py'))

    return write


def plain(value):
    """Settings without the scope that MMEngine adds to what comes from another package."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def without(cfg, *names):
    """All settings but the named ones."""
    return {key: value for key, value in cfg.to_dict().items() if key not in names}


def assert_schedule(cfg, epochs):
    assert cfg.train_cfg.max_epochs == cfg.train_cfg.val_interval == epochs
    assert cfg.default_hooks.param_scheduler.max_epochs == epochs
    checkpoint = cfg.default_hooks.checkpoint
    assert checkpoint.interval == 1 and checkpoint.save_best is None
    assert checkpoint.max_keep_ckpts >= 1


def test_baseline_is_the_config_on_another_schedule(baseline):
    cfg, before = baseline(epochs=7), load_config(SMALL)
    assert_schedule(cfg, 7)
    changed = ('max_epochs', 'train_cfg', 'default_hooks')
    assert without(cfg, *changed) == without(before, *changed)
    hooks = cfg.default_hooks.to_dict()
    del hooks['param_scheduler'], hooks['checkpoint']
    expected = before.default_hooks.to_dict()
    assert hooks == {key: expected[key] for key in hooks}
    assert cfg.default_hooks.param_scheduler.lr_factor == 0.01


def test_config_of_mmyolo(baseline):
    """mmgcp is imported, as the stages need it."""
    cfg = baseline(PLAIN, epochs=3)
    assert cfg.custom_imports.imports == ['mmgcp']
    assert_schedule(cfg, 3)
    assert plain(cfg.model) == plain(load_config(PLAIN).model)


def test_collate_function_of_mmyolo(baseline):
    """MMEngine cannot call a function whose config has a scope."""
    assert baseline(PLAIN).train_dataloader.collate_fn == dict(type='yolov5_collate')


def test_imports_of_the_config_stay(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("custom_imports = dict(imports='json')\nmodel = dict(type='A')\n"
                    'train_cfg = dict(max_epochs=4)\n')
    (tmp_path / 'baseline.py').write_text(
        baseline_config(str(path), load_config(str(path)), 2, None, {}))
    cfg = Config.fromfile(str(tmp_path / 'baseline.py'))
    assert cfg.custom_imports.imports == ['json', 'mmgcp']
    assert cfg.train_cfg.max_epochs == 2
    assert 'param_scheduler' not in cfg.default_hooks  # there was none


def assert_data(dataset, split, classes):
    assert dataset.type == 'mmgcp.VOCFormatDataset'
    assert dataset.data_root == '/data/my pets'
    assert dataset.ann_file == f'ImageSets/Main/{split}.txt'
    assert tuple(dataset.metainfo.classes) == tuple(classes)


@pytest.mark.parametrize('config, old_classes', [(SMALL, 3), (PLAIN, 80)])
def test_other_data(baseline, config, old_classes):
    voc, before = make_voc(dict(train=3, val=3, trainval=6, test=3)), load_config(config)
    cfg = baseline(config, voc=voc)
    assert_data(cfg.train_dataloader.dataset, 'trainval', voc.classes)
    assert_data(cfg.val_dataloader.dataset, 'test', voc.classes)
    assert cfg.test_dataloader == cfg.val_dataloader
    assert cfg.val_dataloader.dataset.test_mode
    assert 'test_mode' not in cfg.train_dataloader.dataset
    for name, pipeline in (('train_dataloader', 'train_pipeline'),
                           ('val_dataloader', 'test_pipeline')):
        assert plain(cfg[name].dataset.pipeline) == plain(before[pipeline])
    for name in ('train_dataloader', 'val_dataloader'):
        assert cfg[name].batch_size == before[name].batch_size
    assert cfg.train_dataloader.collate_fn == dict(type='yolov5_collate')
    assert cfg.val_evaluator.type == 'mmdet.VOCMetric' and cfg.test_evaluator == cfg.val_evaluator
    assert cfg.val_evaluator.iou_thrs == pytest.approx([0.5 + 0.05 * i for i in range(10)])

    head = cfg.model.bbox_head
    assert head.head_module.num_classes == 6
    weight = before.model.bbox_head.loss_cls.loss_weight
    share = 6 / old_classes if head.type == 'YOLOv5Head' else 1
    assert head.loss_cls.loss_weight == pytest.approx(weight * share)
    head.head_module.num_classes = old_classes
    head.loss_cls.loss_weight = weight
    assert plain(cfg.model) == plain(before.model)


def test_loss_weight_of_other_heads(baseline):
    """That of YOLOv8 does not depend on the number of classes."""
    config = 'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py'
    cfg = baseline(config, voc=make_voc(dict(train=3, val=3)))
    assert cfg.model.bbox_head.head_module.num_classes == 6
    before = load_config(config)
    assert plain(cfg.model.bbox_head.loss_cls) == plain(before.model.bbox_head.loss_cls)


def test_two_training_splits(baseline):
    voc = make_voc(dict(train=3, val=3, test=3))
    cfg = baseline(voc=voc)
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == 'ConcatDataset' and set(dataset) == {'type', 'datasets'}
    for inner, split in zip(dataset.datasets, ('train', 'val')):
        assert_data(inner, split, voc.classes)
        assert inner.pipeline == load_config(SMALL).train_pipeline
        assert '_delete_' not in inner
    assert len(dataset.datasets) == 2
    assert_data(cfg.test_dataloader.dataset, 'test', voc.classes)


def test_without_test_split(baseline):
    voc = make_voc(dict(train=3, val=3, trainval=6))
    cfg = baseline(voc=voc)
    assert_data(cfg.train_dataloader.dataset, 'train', voc.classes)
    assert_data(cfg.val_dataloader.dataset, 'val', voc.classes)


def test_options(baseline):
    cfg = baseline(options={'optim_wrapper.optimizer.lr': 0.5, 'env': 'a b'})
    before = load_config(SMALL)
    assert cfg.optim_wrapper.optimizer.lr == 0.5 and cfg.env == 'a b'
    cfg.optim_wrapper.optimizer.lr = before.optim_wrapper.optimizer.lr
    assert cfg.optim_wrapper == before.optim_wrapper


def test_several_options_of_one_setting(baseline):
    cfg = baseline(options={'model.backbone.widen_factor': 0.125, 'model.neck.widen_factor': 0.25})
    assert cfg.model.neck.widen_factor == 0.25
    assert cfg.model.backbone.widen_factor == 0.125
    assert cfg.model.backbone.type == 'mmgcp.YOLOv4CSPDarknet'


def test_options_beside_other_data(baseline):
    """They add to the settings for the data and the schedule instead of replacing them."""
    voc = make_voc(dict(trainval=6, test=3))
    cfg = baseline(voc=voc, epochs=7, options={
        'train_dataloader.batch_size': 4, 'default_hooks.logger.interval': 1,
        'model.test_cfg.score_thr': 0.5})
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.default_hooks.logger.interval == 1 and cfg.model.test_cfg.score_thr == 0.5
    assert_data(cfg.train_dataloader.dataset, 'trainval', voc.classes)
    assert_schedule(cfg, 7)
    assert cfg.model.bbox_head.head_module.num_classes == 6


def test_sparse(baseline, tmp_path):
    cfg = baseline(epochs=7)
    checkpoint = tmp_path / 'base' / "it's.pth"
    (tmp_path / 'sparse.py').write_text(sparse_config(cfg, checkpoint, 5, 0.003, 'linear'))
    sparse = Config.fromfile(str(tmp_path / 'sparse.py'))
    assert sparse.load_from == str(checkpoint)
    assert_schedule(sparse, 5)
    assert sparse.custom_hooks[:-1] == cfg.custom_hooks and len(cfg.custom_hooks) > 0
    assert sparse.custom_hooks[-1] == dict(
        type='mmgcp.DynamicSparsityHook', rate=0.003, schedule=dict(type='linear'))
    changed = ('max_epochs', 'train_cfg', 'default_hooks', 'custom_hooks', 'load_from')
    assert without(sparse, *changed) == without(cfg, *changed)


def test_distill(baseline, tmp_path):
    cfg = baseline(epochs=7)
    (tmp_path / 'pruned').mkdir()
    (tmp_path / 'pruned' / 'pruned.py').write_text(
        "_base_ = '../baseline.py'\nmodel = dict(backbone=dict(widen_factor=0.5))\n")
    teacher, checkpoint = tmp_path / 'baseline.py', tmp_path / 'epoch_7.pth'
    (tmp_path / 'distilled.py').write_text(distill_config(cfg, teacher, checkpoint, 4))
    distilled = Config.fromfile(str(tmp_path / 'distilled.py'))
    assert_schedule(distilled, 4)
    model = distilled.model
    assert set(model) == {'type', 'student', 'teacher', 'groups'}
    assert model.type == 'mmgcp.SpatialAttentionDistiller'
    assert model.student == Config.fromfile(str(tmp_path / 'pruned' / 'pruned.py')).model
    assert model.student.backbone.widen_factor == 0.5
    assert model.teacher == dict(config=str(teacher), checkpoint=str(checkpoint))
    assert model.groups == cfg.attention_groups
    changed = ('max_epochs', 'train_cfg', 'default_hooks', 'model')
    assert without(distilled, *changed) == without(cfg, *changed)

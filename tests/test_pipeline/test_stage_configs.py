# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmgcp.datasets import VOCInfo, check_voc
from mmgcp.errors import UserError
from mmgcp.pipeline.child_config import write_child
from mmgcp.pipeline.stage_configs import (
    baseline_config,
    distill_config,
    sparse_config,
    sparsity_hook,
)
from mmgcp.registry import DATASETS
from mmgcp.utils.config import build_detector, load_config

CONFIGS = Path(__file__).parents[2] / 'configs'
SMALL = str(CONFIGS / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py')
PLAIN = 'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'
RTMDET = 'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py'
YOLOX = 'mmyolo::yolox/yolox_tiny_fast_8xb8-300e_coco.py'
PPYOLOE = 'mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py'
FAMILIES = [
    PLAIN,
    'mmyolo::yolov6/yolov6_n_syncbn_fast_8xb32-400e_coco.py',
    'mmyolo::yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py',
    'mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py',
    YOLOX, RTMDET, PPYOLOE
]


def make_voc(splits, classes=('cat', "cow's", 'dog', 'eel', 'fox', 'gnu')):
    return VOCInfo(
        root=Path('/data/my pets'), splits=splits, classes=list(classes), num_images=9,
        num_objects=dict.fromkeys(classes, 1))


@pytest.fixture
def baseline(tmp_path):
    """A function that writes baseline.py and reads it."""

    def write(config=SMALL, epochs=7, voc=None, options=None, **more):
        return written(tmp_path / 'baseline.py', config, baseline_config, epochs, voc, options,
                       **more)

    return write


def written(path, base, make, *arguments, **options):
    """Write a config that inherits from another one and read it."""
    made = []

    def change(cfg):
        before = copy.deepcopy(cfg.to_dict())
        made.append(make(cfg, *arguments, **options))
        assert cfg.to_dict() == before
        return made[0]

    write_child(path, base, change)
    cfg = Config.fromfile(str(path))
    assert cfg.to_dict() == made[0].to_dict()
    return cfg


def plain(value):
    """Settings without the scope that MMEngine adds to what comes from another package."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def without(cfg, *names):
    """All settings but the named ones."""
    return {key: value for key, value in cfg.to_dict().items() if key not in names}


def assert_schedule(cfg, epochs):
    assert cfg.max_epochs == cfg.train_cfg.max_epochs == epochs
    assert 1 <= cfg.train_cfg.val_interval <= epochs
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
    cfg = written(tmp_path / 'baseline.py', './config.py', baseline_config, 2)
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


def test_several_training_splits(baseline):
    """They are one data set, with a list of their images."""
    voc = make_voc(dict(train=3, val=3, test=3))
    cfg = baseline(voc=voc, train_list='/work/trainval.txt')
    dataset = cfg.train_dataloader.dataset
    assert dataset.ann_file == '/work/trainval.txt' and dataset.data_root == '/data/my pets'
    assert dataset.pipeline == load_config(SMALL).train_pipeline
    assert_data(cfg.test_dataloader.dataset, 'test', voc.classes)


WRAPPED = """
_base_ = {base!r}
inner = _base_.train_dataloader.dataset
train_dataloader = dict(dataset=dict(_delete_=True, {train}))
val_dataloader = dict(dataset=dict(
    _delete_=True, type='ConcatDataset', datasets=[_base_.val_dataloader.dataset]))
"""


def write_wrapped(tmp_path, train):
    path = tmp_path / 'wrapped.py'
    path.write_text(WRAPPED.format(base=SMALL, train=train))
    return str(path)


def test_joined_data(baseline, tmp_path):
    """Ours is one, with the pipeline that each of them has."""
    config = write_wrapped(tmp_path, "type='ConcatDataset', datasets=[inner, inner]")
    cfg, before = baseline(config, voc=make_voc(dict(train=3, test=3))), load_config(SMALL)
    assert_data(cfg.train_dataloader.dataset, 'train', make_voc({}).classes)
    assert cfg.train_dataloader.dataset.pipeline == before.train_dataloader.dataset.pipeline
    assert_data(cfg.val_dataloader.dataset, 'test', make_voc({}).classes)
    assert cfg.val_dataloader.dataset.pipeline == before.val_dataloader.dataset.pipeline


def test_wrapped_data(baseline, tmp_path):
    """The wrapper has a part of the pipeline and stays."""
    config = write_wrapped(
        tmp_path, "type='mmdet.MultiImageMixDataset', dataset=inner, "
        "pipeline=[dict(type='mmdet.RandomFlip', prob=0.5)]")
    cfg = baseline(config, voc=make_voc(dict(train=3, test=3)))
    dataset = cfg.train_dataloader.dataset
    assert set(dataset) == {'type', 'dataset', 'pipeline'}
    assert dataset.type == 'mmdet.MultiImageMixDataset'
    assert dataset.pipeline == [dict(type='mmdet.RandomFlip', prob=0.5)]
    assert_data(dataset.dataset, 'train', make_voc({}).classes)
    expected = load_config(SMALL).train_dataloader.dataset
    assert dataset.dataset.pipeline == expected.pipeline
    assert dataset.dataset.filter_cfg == expected.filter_cfg


def class_numbers(content):
    if isinstance(content, dict):
        return [item for key, item in content.items() if key == 'num_classes'] + [
            number for item in content.values() for number in class_numbers(item)]
    items = content if isinstance(content, (list, tuple)) else ()
    return [number for item in items for number in class_numbers(item)]


@pytest.mark.parametrize('config', FAMILIES, ids=lambda config: config.split('/')[1][:9])
def test_other_data_for_each_family(baseline, config, demo_root):
    cfg, before = baseline(config, voc=check_voc(demo_root)), load_config(config)
    numbers = class_numbers(cfg.model.to_dict())
    assert set(numbers) == {4} and len(numbers) == len(class_numbers(before.model.to_dict()))
    model = build_detector(cfg)
    assert model.bbox_head.num_classes == 4
    for name in ('train_dataloader', 'val_dataloader'):
        assert plain(cfg[name].dataset.pipeline) == plain(before[name].dataset.pipeline)
    filter_cfg = before.train_dataloader.dataset.filter_cfg
    assert plain(cfg.train_dataloader.dataset.filter_cfg) == plain(filter_cfg)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        test = DATASETS.build(cfg.test_dataloader.dataset)
        assert len(test) == 2 and test[0]['inputs'].ndim == 3
        if 'Albu' in str(cfg.train_dataloader.dataset):
            return  # needs a package that is not among ours
        train = DATASETS.build(cfg.train_dataloader.dataset)
    assert len(train) == 6 and train[0]['inputs'].ndim == 3
    labels = {int(label) for index in range(len(train))
              for label in train[index]['data_samples'].gt_instances.labels}
    assert labels and labels <= {0, 1, 2, 3}


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


def test_options_inside_of_lists(baseline):
    """They change an element and keep the rest, also of what the schedule changes."""
    cfg = baseline(YOLOX, epochs=50, options={
        'model.data_preprocessor.batch_augments.0.random_size_range': (64, 96),
        'custom_hooks.2.momentum': 0.01, 'param_scheduler.1.eta_min': 0.5})
    before = load_config(YOLOX)
    augment = cfg.model.data_preprocessor.batch_augments[0]
    assert augment.random_size_range == (64, 96) and augment.interval == 10
    assert len(cfg.custom_hooks) == 3 and cfg.custom_hooks[2].momentum == 0.01
    assert plain(cfg.custom_hooks[0]) == plain(before.custom_hooks[0])
    scheduler = cfg.param_scheduler[1]
    assert (scheduler.begin, scheduler.end, scheduler.eta_min) == (5, 35, 0.5)


def test_options_before_the_schedule(baseline):
    cfg = baseline(RTMDET, epochs=50, options={
        'custom_hooks.1.switch_epoch': 5, 'train_cfg.val_interval': 3, 'param_scheduler': None})
    assert cfg.custom_hooks[1].switch_epoch == 5 and cfg.train_cfg.val_interval == 3
    assert cfg.param_scheduler is None and cfg.train_cfg.max_epochs == 50


def test_option_of_a_scheduler_that_is_left_out(baseline):
    """The others have their options."""
    cfg = baseline(YOLOX, epochs=1, options={'param_scheduler.0.verbose': True})
    assert len(cfg.param_scheduler) == 1 and cfg.param_scheduler[0].verbose is True


def test_learning_rate_of_the_baseline(baseline):
    cfg = baseline(lr=0.123)
    assert cfg.optim_wrapper.optimizer.lr == 0.123
    assert baseline().optim_wrapper == load_config(SMALL).optim_wrapper


def test_options_that_replace_a_setting(baseline):
    cfg = baseline(options={'optim_wrapper._delete_': True, 'optim_wrapper.type': 'OptimWrapper',
                            'optim_wrapper.optimizer': dict(type='Adam', lr=0.1)})
    assert cfg.optim_wrapper == dict(type='OptimWrapper', optimizer=dict(type='Adam', lr=0.1))


SSD = str(CONFIGS / 'ssd' / 'ssd300_r18-half_1xb8-80e_voc.py')


def test_other_data_for_a_head_without_a_module(baseline):
    cfg = baseline(SSD, voc=make_voc(dict(train=3, test=3)))
    assert cfg.model.bbox_head.num_classes == 6
    assert_data(cfg.test_dataloader.dataset, 'test', make_voc({}).classes)


@pytest.mark.yapf
def test_configs_are_short(baseline, tmp_path):
    """They hold what differs from their base."""
    baseline(RTMDET, epochs=50)
    assert len((tmp_path / 'baseline.py').read_text().splitlines()) < 150
    baseline(SMALL, epochs=7)
    assert (tmp_path / 'baseline.py').read_text().splitlines()[0] == f'_base_ = {SMALL!r}'
    written(tmp_path / 'sparse.py', './baseline.py', sparse_config, 'a.pth', 5, HOOK)
    assert len((tmp_path / 'sparse.py').read_text().splitlines()) < 30


HOOK = dict(type='mmgcp.DynamicSparsityHook', rate=0.003, schedule=dict(type='linear'))


def test_sparse(baseline, tmp_path):
    cfg = baseline(epochs=7)
    checkpoint = str(tmp_path / 'base' / "it's.pth")
    sparse = written(
        tmp_path / 'sparse.py', './baseline.py', sparse_config, checkpoint, 5, HOOK, lr=0.002)
    assert sparse.load_from == checkpoint
    assert_schedule(sparse, 5)
    assert sparse.custom_hooks[:-1] == cfg.custom_hooks and len(cfg.custom_hooks) > 0
    assert sparse.custom_hooks[-1] == HOOK
    assert sparse.optim_wrapper.optimizer.lr == 0.002
    changed = ('max_epochs', 'train_cfg', 'default_hooks', 'custom_hooks', 'load_from',
               'optim_wrapper', 'base_lr')
    assert without(sparse, *changed) == without(cfg, *changed)


def test_sparse_with_hooks_of_the_schedule(baseline, tmp_path):
    cfg = baseline(RTMDET, epochs=300)
    sparse = written(tmp_path / 'sparse.py', './baseline.py', sparse_config, 'a.pth', 50, HOOK)
    assert [hook.type for hook in sparse.custom_hooks] == [
        'EMAHook', 'mmdet.PipelineSwitchHook', 'mmgcp.DynamicSparsityHook']
    assert [cfg.custom_hooks[1].switch_epoch, sparse.custom_hooks[1].switch_epoch] == [280, 30]
    assert sparse.custom_hooks[1].switch_pipeline == cfg.custom_hooks[1].switch_pipeline
    assert sparse.optim_wrapper == cfg.optim_wrapper


@pytest.mark.parametrize('optimizer, options, rate, penalty', [
    ('SGD', {}, 1e-3, 'subgradient'),
    ('AdamW', {}, 2e-2, 'proximal'),
    ('torch.optim.Adam', {}, 2e-2, 'proximal'),
    ('AdamW', dict(rate=0.5), 0.5, 'proximal'),
    ('AdamW', dict(penalty='subgradient'), 1e-3, 'subgradient'),
    ('SGD', dict(penalty='proximal'), 2e-2, 'proximal'),
])
def test_sparsity_hook(optimizer, options, rate, penalty):
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(type=optimizer, lr=0.1))))
    assert sparsity_hook(cfg, **options) == dict(
        type='mmgcp.DynamicSparsityHook', rate=rate, penalty=penalty, modules='prunable',
        schedule=dict(type='two_phase'))


def test_sparsity_rate_of_the_config():
    cfg = Config(dict(sparsity_rate=0.25, optim_wrapper=dict(optimizer=dict(type='AdamW'))))
    assert sparsity_hook(cfg)['rate'] == 0.25
    assert sparsity_hook(cfg, rate=0.)['rate'] == 0
    assert sparsity_hook(cfg, schedule='linear')['schedule'] == dict(type='linear')


def test_distill(baseline, tmp_path):
    cfg = baseline(epochs=7)
    (tmp_path / 'pruned').mkdir()
    (tmp_path / 'pruned' / 'pruned.py').write_text(
        "_base_ = '../baseline.py'\nmodel = dict(backbone=dict(widen_factor=0.5))\n")
    teacher, checkpoint = tmp_path / 'baseline.py', tmp_path / 'epoch_7.pth'
    distilled = written(
        tmp_path / 'distilled.py', './pruned/pruned.py', distill_config, teacher, checkpoint, 4,
        cfg.attention_groups)
    assert_schedule(distilled, 4)
    model = distilled.model
    assert set(model) == {'type', 'student', 'teacher', 'groups'}
    assert model.type == 'mmgcp.SpatialAttentionDistiller'
    assert model.student == Config.fromfile(str(tmp_path / 'pruned' / 'pruned.py')).model
    assert model.student.backbone.widen_factor == 0.5
    assert model.teacher == dict(config=str(teacher), checkpoint=str(checkpoint))
    assert model.groups == cfg.attention_groups
    assert distilled.optim_wrapper.optimizer.lr == pytest.approx(cfg.base_lr / 10)
    distilled.optim_wrapper.optimizer.lr, distilled.base_lr = cfg.base_lr, cfg.base_lr
    changed = ('max_epochs', 'train_cfg', 'default_hooks', 'model')
    assert without(distilled, *changed) == without(cfg, *changed)


def test_distill_without_a_learning_rate_in_the_config(baseline):
    """That of the optimizer itself stays."""
    cfg = baseline(epochs=7)
    cfg.optim_wrapper.optimizer.pop('lr')
    found = distill_config(cfg, 'teacher.py', 'c.pth', 4)
    assert found.optim_wrapper == cfg.optim_wrapper
    with pytest.raises(UserError, match='the config says no learning rate'):
        distill_config(cfg, 'teacher.py', 'c.pth', 4, lr=0.1)


def test_distill_with_two_assigners(baseline, tmp_path):
    """The student is trained already; only its second one is left."""
    cfg = baseline(PPYOLOE, epochs=80)
    assert cfg.model.train_cfg.initial_epoch == 30
    (tmp_path / 'pruned').mkdir()
    (tmp_path / 'pruned' / 'pruned.py').write_text("_base_ = '../baseline.py'\n")
    distilled = written(tmp_path / 'distilled.py', './pruned/pruned.py', distill_config,
                        'teacher.py', 'https://a.b/c.pth', 40, lr=0.0005)
    assert distilled.model.teacher.checkpoint == 'https://a.b/c.pth'
    assert distilled.model.groups == 'auto'
    student = distilled.model.student
    assert student.train_cfg.initial_epoch == 0
    assert plain(student.train_cfg.assigner) == plain(cfg.model.train_cfg.assigner)
    assert set(student) == set(cfg.model)
    assert distilled.default_hooks.param_scheduler.total_epochs == 48
    assert distilled.optim_wrapper.optimizer.lr == 0.0005

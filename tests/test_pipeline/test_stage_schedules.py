# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope

from mmgcp.errors import UserError
from mmgcp.pipeline.config_text import nest, render
from mmgcp.pipeline.schedules import base_epochs, default_epochs, derive_schedule
from mmgcp.utils.config import load_config

CONFIGS = Path(__file__).parents[2] / 'configs'
EXAMPLES = sorted(CONFIGS.rglob('*_sparse.py'), key=lambda path: path.name)
BASES = {path.stem[:-len('_sparse')]: path for path in EXAMPLES}
YOLOX = 'mmyolo::yolox/yolox_s_fast_8xb8-300e_coco.py'
YOLOV6 = 'mmyolo::yolov6/yolov6_s_syncbn_fast_8xb32-400e_coco.py'
RTMDET = 'mmyolo::rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py'
PPYOLOE = 'mmyolo::ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py'


@lru_cache(maxsize=None)
def read_base(example):
    """The config that an example is derived from, and its name for a child."""
    base = load_config(str(example)).baseline.config
    base = base if '::' in base else str(CONFIGS.parent / base)
    return base, load_config(base)


def plain(value):
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def essentials(cfg):
    """What depends on the number of epochs."""
    cfg = plain(cfg.to_dict())
    hooks = [hook for hook in cfg['custom_hooks'] if hook['type'] != 'mmgcp.DynamicSparsityHook']
    return dict(
        max_epochs=cfg['max_epochs'], train_cfg=cfg['train_cfg'], custom_hooks=hooks,
        param_scheduler=cfg.get('param_scheduler'),
        hook=cfg['default_hooks']['param_scheduler'],
        initial_epoch=cfg['model'].get('train_cfg', {}).get('initial_epoch'))


def derived_child(base, cfg, epochs, folder, **options):
    """The derived schedule written as a config and read again."""
    path = folder / 'child.py'
    path.write_text(render({'_base_': base, **nest(cfg, derive_schedule(cfg, epochs, **options))}))
    return load_config(str(path))


@pytest.mark.parametrize('name', BASES)
def test_as_the_examples_say_by_hand(name, tmp_path):
    base, cfg = read_base(BASES[name])
    example = load_config(str(BASES[name]))
    expected = essentials(example)
    derived = essentials(derived_child(base, cfg, example.max_epochs, tmp_path))
    if name.startswith('yolov7'):
        # The example validates each tenth epoch to its end; the base's list, which it
        # keeps, begins only behind that
        assert derived['train_cfg'].pop('dynamic_intervals') == [[30, 1]]
        assert expected['train_cfg'].pop('dynamic_intervals') == [[270, 1]]
    if name.startswith('ppyoloe'):
        # With one epoch more it would have a tenth of its 20 epochs
        assert derived['hook'].pop('warmup_epochs') == 2
        assert expected['hook'].pop('warmup_epochs') == 1
    if derived['train_cfg']['val_interval'] != expected['train_cfg']['val_interval']:
        # The example validates as often as is useful by hand, not as the base does
        assert derived['train_cfg']['val_interval'] == cfg.train_cfg.val_interval
        del derived['train_cfg']['val_interval'], expected['train_cfg']['val_interval']
    assert derived == expected


def build_schedulers(cfg, epoch_length):
    """As MMEngine's runner does."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.01)
    with DefaultScope.overwrite_default_scope('mmyolo'):
        return [PARAM_SCHEDULERS.build(copy.deepcopy(dict(item)), default_args=dict(
            optimizer=OptimWrapper(optimizer), epoch_length=epoch_length))
            for item in cfg.get('param_scheduler') or []]


@pytest.mark.parametrize('epochs', [1, 2, 3, 12, 1000])
@pytest.mark.parametrize('name', BASES)
def test_any_number_of_epochs(name, epochs, tmp_path):
    """Nothing is reversed, without length or behind the end, and MMEngine takes it."""
    base, cfg = read_base(BASES[name])
    derived = cfg.copy()
    derived.merge_from_dict(derive_schedule(cfg, epochs))
    if epochs == 1:  # what is written leads to the same
        assert essentials(derived_child(base, cfg, epochs, tmp_path)) == essentials(derived)
    assert derived.max_epochs == derived.train_cfg.max_epochs == epochs
    assert 1 <= derived.train_cfg.val_interval <= epochs
    for epoch, _ in derived.train_cfg.get('dynamic_intervals') or []:
        assert 0 <= epoch < epochs
    for item in derived.get('param_scheduler') or []:
        assert item.begin < item.end
        assert not item.by_epoch or item.end <= epochs
    schedulers = build_schedulers(derived, 3)
    for _ in range(epochs):  # the rates can be computed
        for scheduler in schedulers:
            for _ in range(1 if scheduler.by_epoch else 3):
                scheduler.step()
                assert scheduler.optimizer.param_groups[0]['lr'] >= 0
    for hook in derived.custom_hooks:
        assert epochs - 2 * epochs // 5 <= hook.get('switch_epoch', epochs) <= epochs
        assert 0 <= hook.get('num_last_epochs', 0) <= 2 * epochs // 5
    hook = derived.default_hooks.param_scheduler
    for name in ('max_epochs', 'total_epochs'):
        assert hook.get(name, epochs) >= epochs
    assert hook.get('warmup_epochs', 0) <= epochs
    assert len(derived.custom_hooks) == len(cfg.custom_hooks)


@pytest.mark.parametrize('base', [YOLOX, RTMDET, PPYOLOE, YOLOV6])
def test_same_number_of_epochs(base):
    """Nothing changes but what is made for untrained networks."""
    cfg = load_config(base)
    before = essentials(cfg)
    cfg.merge_from_dict(derive_schedule(cfg, base_epochs(cfg), trained=False))
    assert essentials(cfg) == before


@pytest.mark.parametrize('base, epochs, epoch', [
    (YOLOV6, 100, 1), (YOLOV6, 50, 1), (PPYOLOE, 40, 15), (PPYOLOE, 160, 60)])
def test_first_assigner_of_untrained_networks(base, epochs, epoch):
    cfg = load_config(base)
    schedule = derive_schedule(cfg, epochs, trained=False)
    assert schedule['model.train_cfg.initial_epoch'] == epoch
    assert derive_schedule(cfg, epochs)['model.train_cfg.initial_epoch'] == 0


def test_learning_rate(tmp_path):
    """Absolute rates of the schedulers go with it."""
    cfg = load_config(YOLOX)
    assert not any(key.endswith('lr') for key in derive_schedule(cfg, 50))
    child = derived_child(YOLOX, cfg, 50, tmp_path, lr=0.002)
    assert child.optim_wrapper.optimizer.lr == child.base_lr == 0.002
    assert child.param_scheduler[1].eta_min == 0.0001
    assert child.param_scheduler[2].factor == 1
    assert child.optim_wrapper.optimizer.momentum == 0.9


def test_learning_rate_of_the_biases():
    """That of YOLOv5's hook is absolute, too, even if the config does not say it."""
    schedule = derive_schedule(load_config(YOLOV6), 50, lr=0.001)
    assert schedule['default_hooks.param_scheduler.warmup_bias_lr'] == 0.01
    assert 'default_hooks.param_scheduler.warmup_bias_lr' not in derive_schedule(
        load_config(YOLOV6), 50)


def small_config(epochs=100, schedulers=None, **more):
    return Config(dict(
        model=dict(type='A'), train_cfg=dict(max_epochs=epochs, val_interval=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)), param_scheduler=schedulers,
        **more))


def changed_schedulers(schedulers, epochs):
    cfg = small_config(schedulers=schedulers)
    cfg.merge_from_dict(derive_schedule(cfg, epochs))
    return cfg.param_scheduler


def test_milestones():
    """In proportion, but the last phase keeps its length; in order; none behind the end."""
    steps = dict(type='MultiStepLR', by_epoch=True, milestones=[60, 95])
    assert changed_schedulers([steps], 50)[0].milestones == [30, 45]
    # 88 is moved in proportion, and cannot be after 95
    steps = dict(type='MultiStepLR', milestones=[60, 88, 95])
    assert changed_schedulers([steps], 10)[0].milestones == [6]
    assert changed_schedulers([steps], 50)[0].milestones == [30, 44, 45]
    assert changed_schedulers([steps], 1)[0].milestones == []


def test_order_of_schedulers():
    """One that ends shortly before the last phase does not end behind its beginning."""
    schedulers = [dict(type='ConstantLR', begin=0, end=88), dict(type='LinearLR', begin=88, end=92),
                  dict(type='ConstantLR', begin=92, end=100)]
    moved = changed_schedulers(schedulers, 20)
    assert [(item.begin, item.end) for item in moved] == [(0, 12), (12, 20)]


def test_short_warm_up():
    """One of a single step would leave the rate at its beginning."""
    warm_up = dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=5)
    moved = changed_schedulers([warm_up], 10)[0]
    assert (moved.begin, moved.end, moved.convert_to_iter_based) == (0, 1, True)
    scheduler, = build_schedulers(Config(dict(param_scheduler=[moved])), 10)
    for _ in range(10):
        scheduler.step()
    assert scheduler.optimizer.param_groups[0]['lr'] == pytest.approx(0.01)
    moved = changed_schedulers([warm_up], 30)[0]
    assert (moved.begin, moved.end) == (0, 3) and 'convert_to_iter_based' not in moved
    assert changed_schedulers([warm_up], 300)[0].end == 5


def test_iterations_and_endless_schedulers_stay():
    schedulers = [dict(type='LinearLR', by_epoch=False, begin=0, end=500),
                  dict(type='ExponentialLR', gamma=0.9, by_epoch=True)]
    assert changed_schedulers(schedulers, 10) == schedulers


@pytest.mark.parametrize('base, key', [
    (RTMDET, 'param_scheduler.0.end'),
    (YOLOV6, 'default_hooks.param_scheduler.warmup_mim_iter'),
    (PPYOLOE, 'default_hooks.param_scheduler.warmup_min_iter')])
def test_warm_up_by_iterations(base, key):
    """1000 iterations of warm-up would be more than a small data set has in all."""
    cfg = load_config(base)
    cfg.train_dataloader.batch_size = 16
    assert key not in derive_schedule(cfg, 50)  # the data are not known
    assert derive_schedule(cfg, 50, num_images=292)[key] == 50 * 19 // 10
    assert derive_schedule(cfg, 1, num_images=4)[key] == 1
    assert key not in derive_schedule(cfg, 50, num_images=100000)


def test_single_scheduler():
    scheduler = dict(type='CosineAnnealingLR', T_max=100, by_epoch=True, begin=0, end=100)
    moved = changed_schedulers(scheduler, 40)
    assert moved == dict(scheduler, T_max=40, end=40)


@pytest.mark.parametrize('train_cfg', [
    dict(type='IterBasedTrainLoop', max_iters=1000), None])
def test_no_epochs(train_cfg):
    cfg = small_config()
    cfg.train_cfg = train_cfg
    with pytest.raises(UserError, match=r'no number of epochs \(train_cfg.max_epochs\)'):
        base_epochs(cfg)
    with pytest.raises(UserError, match='by epochs, not by iterations'):
        derive_schedule(cfg, 5)


def test_no_learning_rate():
    cfg = small_config()
    del cfg.optim_wrapper.optimizer['lr']
    assert derive_schedule(cfg, 5)['max_epochs'] == 5
    with pytest.raises(UserError, match='optim_wrapper.optimizer.lr'):
        derive_schedule(cfg, 5, lr=0.1)


@pytest.mark.parametrize('base, epochs', [
    (300, 50), (500, 83), (600, 100), (80, 50), (50, 50), (40, 40), (1, 1)])
def test_default_epochs(base, epochs):
    assert default_epochs(base) == epochs


def test_written_as_by_hand():
    cfg = load_config(YOLOX)
    assert render(nest(cfg, derive_schedule(cfg, 50))) == '''\
max_epochs = 50
train_cfg = dict(max_epochs=50, val_interval=10, dynamic_intervals=[(35, 1)])
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.param_scheduler[1], end=35, T_max=35),
    dict(_base_.param_scheduler[2], begin=35, end=50)]
'''

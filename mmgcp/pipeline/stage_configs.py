# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of the stages: short children of the user's config, each to be run by hand too."""
import os.path as osp
from typing import Dict, List, Optional

from mmengine.config import Config

from mmgcp.datasets import VOCInfo, choose_splits

from .config_text import Code, merge, nest, prefer, render
from .schedules import derive_schedule

# Heads whose classification loss MMYOLO weights by the number of classes
HEADS_WEIGHTED_BY_CLASSES = ('YOLOv5Head', 'YOLOv7Head')
# The usual rate of each penalty: past Adam a scale factor moves by lr * rate an iteration, but
# past SGD with momentum by up to lr / (1 - momentum) * rate
SPARSITY_RATES = dict(subgradient=1e-3, proximal=2e-2)

Settings = Dict[str, object]


def baseline_config(config: str, cfg: Config, epochs: int, voc: Optional[VOCInfo],
                    options: Settings, lr: Optional[float] = None,
                    train_list: Optional[str] = None) -> str:
    """Write the config of the first stage: the user's, on his data and schedule.

    Args:
        config (str): The user's config, a file or as ``mmyolo::…``.
        cfg (Config): The same, read, with the options.
        epochs (int): Number of epochs.
        voc (VOCInfo, optional): A folder in VOC's layout to train and test on instead
            of the config's own data.
        options (dict): More settings to override, by dotted key.
        lr (float, optional): Learning rate. Defaults to the config's.
        train_list (str, optional): The file that lists the images of ``voc`` to train on.
            Defaults to that of its only training set.

    Returns:
        str: The text of the config.
    """
    settings = {'_base_': config if '::' in config else osp.abspath(config), **_imports(cfg)}
    changes = derive_schedule(cfg, epochs, lr, trained=False, num_images=num_training_images(voc))
    if voc is not None:
        settings.update(_voc_data(cfg, voc, train_list))
        changes.update(_classes(cfg, len(voc.classes)))
    # Each epoch is saved to resume from
    settings['default_hooks'] = dict(
        checkpoint=dict(interval=1, max_keep_ckpts=2, save_best=None))
    settings = merge(settings, _plain_collate(config, cfg))
    return render(merge(settings, nest(cfg, prefer(options, changes))))


def sparse_config(cfg: Config, checkpoint: str, epochs: int, hook: Settings,
                  lr: Optional[float] = None, num_images: Optional[int] = None) -> str:
    """Write the config of sparse training.

    Args:
        cfg (Config): The baseline's config, read.
        checkpoint (str): The trained baseline.
        epochs (int): Number of epochs.
        hook (dict): The sparsity hook, see :func:`sparsity_hook`.
        lr (float, optional): Learning rate. Defaults to the baseline's.
        num_images (int, optional): How many training images there are, if known.

    Returns:
        str: The text of the config.
    """
    settings = nest(cfg, derive_schedule(cfg, epochs, lr, num_images=num_images))
    inherited = [Code('*_base_.custom_hooks')] if cfg.get('custom_hooks') else []
    settings['custom_hooks'] = [*settings.get('custom_hooks', inherited), hook]
    return render({'_base_': './baseline.py', 'load_from': str(checkpoint), **settings})


def sparsity_hook(cfg: Config, rate: Optional[float] = None, penalty: Optional[str] = None,
                  schedule: str = 'two_phase') -> Settings:
    """Choose the sparsity hook that fits a config.

    Args:
        cfg (Config): The config, perhaps with a ``sparsity_rate``.
        rate (float, optional): Defaults to ``sparsity_rate``, or what is usual with the
            penalty: 1e-3, and 2e-2 with the proximal one.
        penalty (str, optional): Defaults to 'proximal' for optimizers of the Adam kind, in
            which a gradient would lose its scale, and to 'subgradient' for others.
        schedule (str): Type of the schedule. Defaults to 'two_phase'.

    Returns:
        dict: The config of the hook.
    """
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if penalty is None:
        is_adam = 'adam' in str(optimizer.get('type')).lower()
        penalty = 'proximal' if is_adam else 'subgradient'
    if rate is None:
        rate = cfg.get('sparsity_rate', SPARSITY_RATES[penalty])
    return dict(
        type='mmgcp.DynamicSparsityHook', rate=rate, schedule=dict(type=schedule),
        modules='prunable', penalty=penalty)


def distill_config(cfg: Config, teacher: str, checkpoint: str, epochs: int,
                   lr: Optional[float] = None, num_images: Optional[int] = None) -> str:
    """Write the config of spatial attention distilling.

    Args:
        cfg (Config): The baseline's config, read.
        teacher (str): The config of the baseline, the teacher.
        checkpoint (str): The trained baseline.
        epochs (int): Number of epochs.
        lr (float, optional): Learning rate. Defaults to the baseline's.
        num_images (int, optional): How many training images there are, if known.

    Returns:
        str: The text of the config.
    """
    settings = nest(cfg, derive_schedule(cfg, epochs, lr, num_images=num_images))
    student = '_base_.model'
    if 'model' in settings:
        assigner = settings['model']['train_cfg']['initial_epoch']
        student = ('dict(_base_.model, train_cfg=dict(_base_.model.train_cfg, '
                   f'initial_epoch={assigner}))')
    settings['model'] = dict(
        _delete_=True,
        type='mmgcp.SpatialAttentionDistiller',
        student=Code(student),
        teacher=dict(config=str(teacher), checkpoint=str(checkpoint)),
        groups=Code('_base_.attention_groups') if 'attention_groups' in cfg else 'auto')
    return render({'_base_': './pruned/pruned.py', **settings})


def num_training_images(voc: Optional[VOCInfo]) -> Optional[int]:
    """Return how many images of a folder are trained on, None without one."""
    return sum(voc.splits[split] for split in choose_splits(voc)[0]) if voc else None


def _imports(cfg: Config) -> Settings:
    """Import mmgcp beside what the user's config imports."""
    imports = cfg.get('custom_imports', {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmgcp' in imports:
        return {}
    return dict(custom_imports=dict(imports=[*imports, 'mmgcp'], allow_failed_imports=False))


def _plain_collate(config: str, cfg: Config) -> Settings:
    """Say the collate function anew if it is inherited from ``mmyolo::``.

    MMEngine passes the scope that it has from there on to the function.
    """
    collate_fn = dict(cfg.get('train_dataloader', {}).get('collate_fn') or {})
    if not collate_fn or not ('::' in config or '_scope_' in collate_fn):
        return {}
    collate_fn.pop('_scope_', None)
    return dict(train_dataloader=dict(collate_fn=dict(_delete_=True, **collate_fn)))


def _voc_data(cfg: Config, voc: VOCInfo, train_list: Optional[str]) -> Settings:
    """Train and test on a folder in VOC's layout, with the pipelines of the config."""
    train_splits, test_split = choose_splits(voc)
    if train_list is None:
        train_list = _image_set(train_splits[0])
    train = _replaced(cfg.train_dataloader.dataset, '_base_.train_dataloader.dataset', train_list)
    test_name = 'val_dataloader' if cfg.get('val_dataloader') else 'test_dataloader'
    path = _innermost(cfg[test_name].dataset, f'_base_.{test_name}.dataset')
    test = dict(_voc_dataset(_image_set(test_split)), test_mode=True,
                pipeline=Code(f'{path}.pipeline'))
    return dict(
        data_root=str(voc.root.resolve()),
        metainfo=dict(classes=tuple(voc.classes)),
        train_dataloader=dict(dataset=dict(_delete_=True, **train)),
        val_dataloader=dict(dataset=dict(_delete_=True, **test)),
        test_dataloader=Code('val_dataloader'),
        val_evaluator=dict(
            _delete_=True,
            type='mmdet.VOCMetric',
            metric='mAP',
            eval_mode='area',
            iou_thrs=Code('[percent / 100 for percent in range(50, 100, 5)]')),
        test_evaluator=Code('val_evaluator'))


def _image_set(split: str) -> str:
    return f'ImageSets/Main/{split}.txt'


def _voc_dataset(ann_file: str) -> Settings:
    return dict(
        type='mmgcp.VOCFormatDataset',
        data_root=Code('data_root'),
        metainfo=Code('metainfo'),
        ann_file=ann_file)


def _replaced(base: Settings, path: str, ann_file: str) -> Settings:
    """The training data set of the config, with other data in its wrappers."""
    if base.get('datasets'):  # joined: ours is one
        return _replaced(base['datasets'][0], f'{path}.datasets[0]', ann_file)
    if base.get('dataset'):
        kept = {name: Code(f'{path}.{name}') for name in base if name not in ('type', '_scope_')}
        inner = _replaced(base['dataset'], f'{path}.dataset', ann_file)
        return dict(kept, type=base['type'], dataset=inner)
    filter_cfg = base.get('filter_cfg') or dict(filter_empty_gt=False, min_size=32)
    return dict(_voc_dataset(ann_file), filter_cfg=_plain(filter_cfg),
                pipeline=Code(f'{path}.pipeline'))


def _innermost(base: Settings, path: str) -> str:
    """Where the data set is that is inside of wrappers."""
    if base.get('datasets'):
        return _innermost(base['datasets'][0], f'{path}.datasets[0]')
    if base.get('dataset'):
        return _innermost(base['dataset'], f'{path}.dataset')
    return path


def _plain(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name != '_scope_'}


def _classes(cfg: Config, num_classes: int) -> Settings:
    """Set the number of classes wherever the model has it, and the loss weight for it."""
    head = cfg.model.bbox_head
    before = head.head_module.num_classes
    changes = {f'model.{key}': num_classes for key in _find(cfg.model, 'num_classes', before)}
    if head.type.split('.')[-1] in HEADS_WEIGHTED_BY_CLASSES:
        weight = head.loss_cls.loss_weight / before * num_classes
        changes['model.bbox_head.loss_cls.loss_weight'] = weight
    return changes


def _find(content: object, name: str, value: object) -> List[str]:
    """The dotted keys of all settings with a name and a value."""
    if isinstance(content, dict):
        items = content.items()
    else:
        items = enumerate(content) if isinstance(content, (list, tuple)) else ()
    found = []
    for key, item in items:
        if key == name and item == value:
            found.append(str(key))
        found += [f'{key}.{inner}' for inner in _find(item, name, value)]
    return found

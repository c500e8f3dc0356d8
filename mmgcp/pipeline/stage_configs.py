# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of the stages: short children of the user's config, each to be run by hand too."""
import os.path as osp
from pathlib import Path
from typing import Dict, Optional

from mmengine.config import Config

from mmgcp.datasets import VOCInfo, choose_splits

from .config_text import Code, merge, render

# Heads whose classification loss MMYOLO weights by the number of classes
HEADS_WEIGHTED_BY_CLASSES = ('YOLOv5Head', 'YOLOv7Head')

Settings = Dict[str, object]


def baseline_config(config: str, cfg: Config, epochs: int, voc: Optional[VOCInfo],
                    options: Settings) -> str:
    """Write the config of the first stage: the user's, on his data and schedule.

    Args:
        config (str): The user's config, a file or as ``mmyolo::…``.
        cfg (Config): The same, read.
        epochs (int): Number of epochs.
        voc (VOCInfo, optional): A folder in VOC's layout to train and test on instead
            of the config's own data.
        options (dict): More settings to override, by dotted key.

    Returns:
        str: The text of the config.
    """
    settings = {'_base_': config if '::' in config else osp.abspath(config), **_imports(cfg)}
    if voc is not None:
        settings.update(_voc_data(cfg, voc))
    settings = merge(settings, _plain_collate(config, cfg))
    settings = merge(settings, _schedule(cfg, epochs))
    return render(merge(settings, options))


def sparse_config(cfg: Config, checkpoint: Path, epochs: int, rate: float, schedule: str) -> str:
    """Write the config of sparse training.

    Args:
        cfg (Config): The baseline's config, read.
        checkpoint (Path): The trained baseline.
        epochs (int): Number of epochs.
        rate (float): Rate of the sparsity penalty.
        schedule (str): Schedule of the rate.

    Returns:
        str: The text of the config.
    """
    hook = f"dict(type='mmgcp.DynamicSparsityHook', rate={rate}, schedule=dict(type={schedule!r}))"
    hooks = ['*_base_.custom_hooks', hook] if cfg.get('custom_hooks') else [hook]
    return render({
        '_base_': './baseline.py',
        'load_from': str(checkpoint),
        'custom_hooks': Code('[\n    ' + ',\n    '.join(hooks) + '\n]'),
        **_schedule(cfg, epochs)
    })


def distill_config(cfg: Config, teacher: Path, checkpoint: Path, epochs: int) -> str:
    """Write the config of spatial attention distilling.

    Args:
        cfg (Config): The baseline's config, read.
        teacher (Path): The config of the baseline, the teacher.
        checkpoint (Path): The trained baseline.
        epochs (int): Number of epochs.

    Returns:
        str: The text of the config.
    """
    return render({
        '_base_': './pruned/pruned.py',
        'model': dict(
            _delete_=True,
            type='mmgcp.SpatialAttentionDistiller',
            student=Code('_base_.model'),
            teacher=dict(config=str(teacher), checkpoint=str(checkpoint)),
            groups=Code('_base_.attention_groups') if 'attention_groups' in cfg else 'auto'),
        **_schedule(cfg, epochs)
    })


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


def _schedule(cfg: Config, epochs: int) -> Settings:
    """Set the number of epochs, validate at the end, and save each epoch to resume from."""
    hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2, save_best=None))
    if 'max_epochs' in (cfg.get('default_hooks', {}).get('param_scheduler') or {}):
        hooks['param_scheduler'] = dict(max_epochs=epochs)
    return dict(
        max_epochs=epochs,
        train_cfg=dict(max_epochs=epochs, val_interval=epochs),
        default_hooks=hooks)


def _voc_data(cfg: Config, voc: VOCInfo) -> Settings:
    """Train and test on a folder in VOC's layout."""
    train_splits, test_split = choose_splits(voc)

    def dataset(split: str, **more) -> Settings:
        return dict(
            type='mmgcp.VOCFormatDataset',
            data_root=Code('data_root'),
            metainfo=Code('metainfo'),
            ann_file=f'ImageSets/Main/{split}.txt',
            **more)

    train_sets = [
        dataset(split, filter_cfg=dict(filter_empty_gt=False, min_size=32),
                pipeline=Code('_base_.train_pipeline')) for split in train_splits
    ]
    train = train_sets[0] if len(train_sets) == 1 else dict(
        type='ConcatDataset', datasets=train_sets)
    test = dataset(test_split, test_mode=True, pipeline=Code('_base_.test_pipeline'))
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
        test_evaluator=Code('val_evaluator'),
        model=dict(bbox_head=_head(cfg, len(voc.classes))))


def _head(cfg: Config, num_classes: int) -> Settings:
    """Set the number of classes, and the loss weight that depends on it."""
    bbox_head = cfg.model.bbox_head
    settings = dict(head_module=dict(num_classes=num_classes))
    if bbox_head.type.split('.')[-1] in HEADS_WEIGHTED_BY_CLASSES:
        per_class = bbox_head.loss_cls.loss_weight / bbox_head.head_module.num_classes
        settings['loss_cls'] = dict(loss_weight=per_class * num_classes)
    return settings

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of the stages: short children of the user's config, each to be run by hand too."""
import os.path as osp
from pathlib import Path
from typing import Dict, List, Optional

from mmengine.config import Config

from mmgcp.datasets import VOCInfo, choose_splits

# Heads whose classification loss MMYOLO weights by the number of classes
HEADS_WEIGHTED_BY_CLASSES = ('YOLOv4Head', 'YOLOv5Head', 'YOLOv7Head')


def baseline_config(config: str, cfg: Config, epochs: int, voc: Optional[VOCInfo],
                    options: Dict[str, object]) -> str:
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
    lines = [f'_base_ = {config if "::" in config else osp.abspath(config)!r}', '']
    lines += _imports(cfg)
    if voc is not None:
        lines += _voc_data(cfg, voc)
    lines += _schedule(cfg, epochs)
    lines += _nested(options)
    return '\n'.join(lines) + '\n'


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
    return '\n'.join([
        "_base_ = './baseline.py'", '', f'load_from = {str(checkpoint)!r}',
        f'custom_hooks = [*_base_.custom_hooks, {hook}]', *_schedule(cfg, epochs)
    ]) + '\n'


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
    return '\n'.join([
        "_base_ = './pruned/pruned.py'", '',
        'model = dict(', '    _delete_=True,', "    type='mmgcp.SpatialAttentionDistiller',",
        '    student=_base_.model,',
        f'    teacher=dict(config={str(teacher)!r},',
        f'                 checkpoint={str(checkpoint)!r}),',
        '    groups=_base_.attention_groups)', *_schedule(cfg, epochs)
    ]) + '\n'


def _imports(cfg: Config) -> List[str]:
    """Import mmgcp beside what the user's config imports."""
    imports = cfg.get('custom_imports', {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmgcp' in imports:
        return []
    return [f'custom_imports = dict(imports={[*imports, "mmgcp"]}, allow_failed_imports=False)']


def _schedule(cfg: Config, epochs: int) -> List[str]:
    """Set the number of epochs, validate at the end, and save each epoch to resume from."""
    lines = [f'max_epochs = {epochs}',
             'train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)']
    checkpoint = 'checkpoint=dict(interval=1, max_keep_ckpts=2, save_best=None)'
    scheduler = cfg.get('default_hooks', {}).get('param_scheduler') or {}
    if 'max_epochs' in scheduler:
        lines.append('default_hooks = dict(\n'
                     '    param_scheduler=dict(max_epochs=max_epochs),\n'
                     f'    {checkpoint})')
    else:
        lines.append(f'default_hooks = dict({checkpoint})')
    return lines


def _voc_data(cfg: Config, voc: VOCInfo) -> List[str]:
    """Train and test on a folder in VOC's layout."""
    train_splits, test_split = choose_splits(voc)
    old, new = _num_classes(cfg.model), len(voc.classes)
    head = {'head_module': dict(num_classes=new)}
    bbox_head = cfg.model.bbox_head
    if bbox_head.type.split('.')[-1] in HEADS_WEIGHTED_BY_CLASSES:
        head['loss_cls'] = dict(loss_weight=bbox_head.loss_cls.loss_weight * new / old)
    dataset = ("dict(\n        type='mmgcp.VOCFormatDataset',\n        data_root=data_root,\n"
               '        metainfo=metainfo,\n')
    train_sets = [
        f"{dataset}        ann_file='ImageSets/Main/{split}.txt',\n"
        '        filter_cfg=dict(filter_empty_gt=False, min_size=32),\n'
        '        pipeline=_base_.train_pipeline)' for split in train_splits
    ]
    train = train_sets[0]
    if len(train_sets) > 1:
        train = f"dict(\n        type='ConcatDataset',\n        datasets=[{', '.join(train_sets)}])"
    return [
        f'data_root = {str(voc.root.resolve())!r}',
        f'metainfo = dict(classes={tuple(voc.classes)!r})',
        'train_dataloader = dict(',
        "    collate_fn=dict(_delete_=True, type='yolov5_collate'),",
        f'    dataset={_anew(train)})',
        'val_dataloader = dict(',
        f'    dataset={_anew(dataset)}'
        f"        ann_file='ImageSets/Main/{test_split}.txt',\n        test_mode=True,\n"
        '        pipeline=_base_.test_pipeline))',
        'test_dataloader = val_dataloader',
        'val_evaluator = dict(',
        "    _delete_=True, type='mmdet.VOCMetric', metric='mAP', eval_mode='area',",
        '    iou_thrs=[percent / 100 for percent in range(50, 100, 5)])',
        'test_evaluator = val_evaluator',
        f'model = dict(bbox_head={head!r})',
    ]


def _anew(text: str) -> str:
    """Let a dictionary replace that of the base instead of being merged with it."""
    return text.replace('dict(\n', 'dict(\n        _delete_=True,\n', 1)


def _num_classes(model: dict) -> int:
    return model['bbox_head']['head_module']['num_classes']


def _nested(options: Dict[str, object]) -> List[str]:
    """Turn dotted settings into assignments that merge with the base."""
    lines = []
    for key, value in options.items():
        name, *path = key.split('.')
        for part in reversed(path):
            value = {part: value}
        lines.append(f'{name} = {value!r}')
    return lines

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Training and testing on a folder in VOC's layout instead of a config's own data."""
import copy
from typing import List, Optional

from mmengine.config import Config

from mmgcp.datasets import VOCInfo, choose_splits
from mmgcp.utils.config_content import type_name

# Heads whose classification loss MMYOLO weights by the number of classes
HEADS_WEIGHTED_BY_CLASSES = ('YOLOv5Head', 'YOLOv7Head')


def num_training_images(voc: Optional[VOCInfo]) -> Optional[int]:
    """Return the number of training images of a folder, None without a folder."""
    return sum(voc.splits[split] for split in choose_splits(voc)[0]) if voc else None


def use_voc_data(cfg: Config, voc: VOCInfo, train_list: Optional[str] = None) -> None:
    """Replace the data of a config, but keep its pipelines, and fit its model to the classes.

    Args:
        cfg (Config): The config, changed in place.
        voc (VOCInfo): The folder.
        train_list (str, optional): File that lists the training images. Defaults to that of the
            folder's only training split.
    """
    train_splits, test_split = choose_splits(voc)
    cfg.data_root = str(voc.root.resolve())
    cfg.metainfo = dict(classes=tuple(voc.classes))
    data = dict(type='mmgcp.VOCFormatDataset', data_root=cfg.data_root, metainfo=cfg.metainfo)
    train = dict(data, ann_file=train_list or _image_set(train_splits[0]))
    cfg.train_dataloader.dataset = replace_dataset(cfg.train_dataloader.dataset, train)
    names = [name for name in ('val_dataloader', 'test_dataloader') if cfg.get(name)]
    pipeline = innermost_dataset(cfg[names[0]].dataset)['pipeline']
    test = dict(data, ann_file=_image_set(test_split), test_mode=True, pipeline=pipeline)
    for name in names:
        cfg[name].dataset = copy.deepcopy(test)
    for name in ('val_evaluator', 'test_evaluator'):
        cfg[name] = dict(type='mmdet.VOCMetric', metric='mAP', eval_mode='area',
                         iou_thrs=[percent / 100 for percent in range(50, 100, 5)])
    _set_num_classes(cfg, len(voc.classes))


def _image_set(split: str) -> str:
    return f'ImageSets/Main/{split}.txt'


def replace_dataset(dataset: dict, data: dict) -> dict:
    """Return the config of a training data set with other data inside its wrappers.

    Args:
        dataset (dict): The config, with its pipeline.
        data (dict): That of the other data, without a pipeline.

    Returns:
        dict: The new config.
    """
    if dataset.get('datasets'):  # several that are joined give way to one
        return replace_dataset(dataset['datasets'][0], data)
    if dataset.get('dataset'):
        return dict(_without_scope(dataset), dataset=replace_dataset(dataset['dataset'], data))
    filter_cfg = dataset.get('filter_cfg') or dict(filter_empty_gt=False, min_size=32)
    return dict(data, filter_cfg=_without_scope(filter_cfg), pipeline=dataset['pipeline'])


def innermost_dataset(dataset: dict) -> dict:
    """Return the config of the data set inside of all wrappers."""
    while dataset.get('datasets') or dataset.get('dataset'):
        dataset = dataset['datasets'][0] if dataset.get('datasets') else dataset['dataset']
    return dataset


def _without_scope(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != '_scope_'}


def _set_num_classes(cfg: Config, num_classes: int) -> None:
    """Set the number of classes wherever the model has it, and the loss weight that follows."""
    head = cfg.model.bbox_head
    before = head.get('head_module', head).num_classes
    keys = _find(cfg.model, 'num_classes', before)
    cfg.merge_from_dict({f'model.{key}': num_classes for key in keys})
    if type_name(head.type) in HEADS_WEIGHTED_BY_CLASSES:
        weight = head.loss_cls.loss_weight / before * num_classes
        cfg.merge_from_dict({'model.bbox_head.loss_cls.loss_weight': weight})


def _find(content: object, name: str, value: object) -> List[str]:
    """Return the dotted keys of all settings with this name and value."""
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

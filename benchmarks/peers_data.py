# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The data that peers are compared on: what to calibrate, train and test with."""
import argparse
import copy
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from mmcv.transforms import BaseTransform, Compose
from mmengine.config import Config
from mmengine.registry import TRANSFORMS

from mmgcp.errors import UserError
from mmgcp.pipeline.voc_data import innermost_dataset, replace_dataset
from mmgcp.utils.config import drop_collate_scope, image_size, nested_dicts, replace_scale
from mmgcp.utils.config_content import plain_content, type_name

# Of loaders with workers, or such as a loader of batches of one size does not take
WORKER_KEYS = ('prefetch_factor', 'multiprocessing_context', 'timeout', 'worker_init_fn')


class Images(NamedTuple):
    """Annotations in COCO's format and the folder with the images."""
    annotations: str
    folder: str


def images(text: str) -> Images:
    """Read ``ANNOTATIONS:FOLDER`` from a command line."""
    annotations, colon, folder = text.rpartition(':')
    if not colon or not Path(annotations).is_file() or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(
            f'expected a file of annotations and a folder of images as ANNOTATIONS:FOLDER, but '
            f'got {text}')
    return Images(str(Path(annotations).resolve()), str(Path(folder).resolve()))


@TRANSFORMS.register_module(force=True)
class Remembered(BaseTransform):
    """Transforms without chance, whose results are kept: each image is read once.

    Args:
        transforms (Sequence[dict]): Their configs; the first one reads the image.
    """

    def __init__(self, transforms: Sequence[dict]):
        self._transforms = Compose(transforms)
        self._found: Dict[str, dict] = {}

    def transform(self, results: dict) -> dict:
        """Transform what a data set says of an image, without the data set itself.

        MMYOLO adds that for mosaics; copies of it would have copies of all that is kept here.
        """
        path = results['img_path']
        if path not in self._found:
            results = {name: value for name, value in results.items() if name != 'dataset'}
            self._found[path] = self._transforms(results)
        return copy.deepcopy(self._found[path])


def with_training_data(cfg: Config, sources: Optional[Sequence[Images]], size: int,
                       batch_size: int, augmented: bool) -> Config:
    """Return a config that loads training images of a size.

    Args:
        cfg (Config): A complete config.
        sources (Sequence[Images], optional): Where they are; by default, the config's.
        size (int): Width and height in pixels.
        batch_size (int): Images in a batch.
        augmented (bool): Whether to load them with the config's own pipeline; otherwise, they
            are resized as for a test, and flipped at random.
    """
    cfg = copy.deepcopy(cfg)
    loader = loader_without_workers(cfg, 'train_dataloader')
    dataset = loader['dataset'] if augmented else _plain(cfg, loader['dataset'])
    dataset = replace_scale(dataset, image_size(cfg), (size, size))
    if sources:
        parts = [replace_dataset(dataset, _dataset(cfg, dataset, item)) for item in sources]
        dataset = parts[0] if len(parts) == 1 else dict(type='ConcatDataset', datasets=parts)
    cfg.train_dataloader = dict(loader, dataset=dataset, batch_size=batch_size)
    return cfg


def with_test_data(cfg: Config, source: Optional[Images], size: int, batch_size: int) -> Config:
    """Return a config that is validated on images of a size, padded to squares.

    Args:
        cfg (Config): A complete config.
        source (Images, optional): Where they are; by default, the config's.
        size (int): Width and height in pixels.
        batch_size (int): Images in a batch.
    """
    cfg = copy.deepcopy(cfg)
    loader = loader_without_workers(cfg, 'val_dataloader')
    dataset = replace_scale(loader['dataset'], image_size(cfg), (size, size))
    if source:
        inner = innermost_dataset(dataset)
        dataset = dict(_dataset(cfg, dataset, source), test_mode=True, pipeline=inner['pipeline'])
        cfg.val_evaluator = dict(type='mmdet.CocoMetric', ann_file=source.annotations,
                                 metric='bbox', proposal_nums=(100, 1, 10))
    elif 'batch_shapes_cfg' in dataset:
        dataset['batch_shapes_cfg'] = None
    cfg.val_dataloader = dict(loader, dataset=dataset, batch_size=batch_size)
    return cfg


def _plain(cfg: Config, dataset: dict) -> dict:
    """The config of a data set without wrappers, whose images are resized and flipped."""
    steps = innermost_dataset(loader_without_workers(cfg, 'val_dataloader')['dataset'])['pipeline']
    annotations = next((part for part in nested_dicts(dataset) if _is(part, 'LoadAnnotations')),
                       dict(type='LoadAnnotations', with_bbox=True))
    resizing = [step for step in steps[1:]
                if not _is(step, 'LoadAnnotations') and not _is(step, 'PackDetInputs')]
    pack = next(part for part in nested_dicts(dataset) if _is(part, 'PackDetInputs'))
    return dict(innermost_dataset(dataset), pipeline=[
        dict(type='mmengine.Remembered', transforms=[steps[0], annotations, *resizing]),
        dict(type='mmdet.RandomFlip', prob=0.5), pack])


def _is(step: dict, kind: str) -> bool:
    return type_name(step.get('type')) == kind


def describe(sources: Optional[Sequence[Images]]) -> List[str]:
    """What results depend on: the files."""
    return [':'.join(item) for item in sources or []]


def loader_without_workers(cfg: Config, name: str) -> dict:
    """The settings of a loader, which loads in this process."""
    if not cfg.get(name):
        raise UserError(f'the config has no {name}')
    loader = plain_content(cfg[name])
    drop_collate_scope(loader)
    loader = {key: value for key, value in loader.items() if key not in WORKER_KEYS}
    return dict(loader, num_workers=0, persistent_workers=False)


def _dataset(cfg: Config, dataset: dict, source: Images) -> dict:
    """The config of a data set in COCO's format, with the classes of another one."""
    kind = 'YOLOv5CocoDataset' if cfg.get('default_scope') == 'mmyolo' else 'mmdet.CocoDataset'
    found = dict(type=kind, data_root='', ann_file=source.annotations,
                 data_prefix=dict(img=f'{source.folder}/'))
    classes = innermost_dataset(dataset).get('metainfo')
    return dict(found, metainfo=classes) if classes else found

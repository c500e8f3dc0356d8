# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Checks a folder in PASCAL VOC's layout before a detector is trained on it.

The layout is ``JPEGImages/*.jpg``, ``Annotations/*.xml`` and ``ImageSets/Main/*.txt``.
"""
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from mmgcp.errors import VOCError

from .voc_files import (
    PathLike,
    check_against_image,
    check_class_names,
    read_annotation,
    read_image_size,
    read_lines,
)

IMAGE_DIR = 'JPEGImages'
ANNOTATION_DIR = 'Annotations'
SPLIT_DIR = 'ImageSets/Main'
LAYOUT = (IMAGE_DIR, ANNOTATION_DIR, SPLIT_DIR)


@dataclass(frozen=True)
class VOCInfo:
    """The contents of a data set in PASCAL VOC's format.

    Attributes:
        root (Path): The folder with JPEGImages, Annotations and ImageSets/Main.
        splits (dict[str, int]): Number of images of each image set.
        classes (list[str]): Names of all annotated objects, sorted.
        num_images (int): Number of different images in all the image sets.
        num_objects (dict[str, int]): Number of objects of each class.
    """

    root: Path
    splits: Dict[str, int]
    classes: List[str]
    num_images: int
    num_objects: Dict[str, int]


def find_voc_root(path: PathLike) -> Path:
    """Find the folder with the three VOC folders: ``path`` or its only such subfolder."""
    path = Path(path)
    if not path.is_dir():
        raise VOCError(f'The data set folder {path} does not exist.')
    if _has_layout(path):
        return path
    candidates = sorted(child for child in path.iterdir() if _has_layout(child))
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        names = ', '.join(child.name for child in candidates)
        raise VOCError(f'{path} holds several VOC data sets ({names}): name one of them.')
    missing = ', '.join(name for name in LAYOUT if not (path / name).is_dir())
    raise VOCError(f'{path} is not a VOC data set: it has no {missing}.')


def check_voc(path: PathLike, classes: Optional[Sequence[str]] = None) -> VOCInfo:
    """Read all image sets of a data set, and check their annotations and the heads of images.

    Args:
        path (str | Path): The folder with the three VOC folders, or its parent.
        classes (Sequence[str], optional): The only class names that are allowed. Defaults to
            None: any.

    Returns:
        VOCInfo: The image sets, classes and counts.

    Raises:
        VOCError: A folder or file is missing, an annotation or an image cannot be read, they do
            not fit each other, a box has no positive size or an object has a class that is not
            allowed. The message names the first fault.
    """
    root = find_voc_root(path)
    splits = _read_splits(root)
    image_ids = sorted({image_id for ids in splits.values() for image_id in ids})
    counter = Counter()
    for image_id in image_ids:
        xml_path = root / ANNOTATION_DIR / f'{image_id}.xml'
        annotation = read_annotation(xml_path)
        if classes is not None:
            check_class_names(annotation.names, classes, xml_path)
        size = read_image_size(root / IMAGE_DIR / f'{image_id}.jpg')
        check_against_image(annotation, size, xml_path)
        counter.update(annotation.names)
    return VOCInfo(
        root=root,
        splits={name: len(ids) for name, ids in splits.items()},
        classes=sorted(counter),
        num_images=len(image_ids),
        num_objects=dict(sorted(counter.items())))


def choose_splits(info: VOCInfo) -> Tuple[List[str], str]:
    """Choose image sets without common images for training and for testing.

    If there is a test set, trainval or otherwise train and val are for training. If there is
    none, val is for testing and train for training. An empty image set counts as missing.

    Args:
        info (VOCInfo): The data set.

    Returns:
        tuple[list[str], str]: Names of the training sets and of the test set.

    Raises:
        VOCError: There are no such image sets.
    """
    present = [name for name, number in info.splits.items() if number]
    if 'test' in present:
        test = 'test'
        names = ['trainval'] if 'trainval' in present else ['train', 'val']
    else:
        test = 'val'
        names = ['train']
    train = [name for name in names if name in present]
    if not train or test not in present:
        raise VOCError(
            f'{info.root / SPLIT_DIR} must have trainval.txt or train.txt to train on and '
            f'test.txt or val.txt to test on, but only has images in: '
            f'{", ".join(present) or "none"}.')
    return train, test


def _has_layout(path: Path) -> bool:
    return all((path / name).is_dir() for name in LAYOUT)


def _read_splits(root: Path) -> Dict[str, List[str]]:
    splits = {}
    for split_path in sorted((root / SPLIT_DIR).glob('*.txt')):
        lines = read_lines(split_path)
        if _is_class_list(lines):
            continue
        for line in lines:
            _check_files(root, line, split_path)
        splits[split_path.stem] = lines
    if not splits:
        raise VOCError(f'{root / SPLIT_DIR} has no image set such as train.txt.')
    return splits


def _is_class_list(lines: List[str]) -> bool:
    """Whether the lines have an image and 1, 0 or -1 each, as those of dog_train.txt."""
    return bool(lines) and all(re.fullmatch(r'\S+\s+(-1|0|1)', line.strip()) for line in lines)


def _check_files(root: Path, image_id: str, split_path: Path) -> None:
    if not image_id or image_id != image_id.strip():
        raise VOCError(f'{split_path} has an empty line or spaces around a name: {image_id!r}.')
    for folder, suffix in ((IMAGE_DIR, '.jpg'), (ANNOTATION_DIR, '.xml')):
        path = root / folder / f'{image_id}{suffix}'
        if not path.is_file():
            raise VOCError(f'{split_path} names {image_id!r}, but {path} does not exist.')

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Writes a small detection data set in PASCAL VOC's format, for demonstrations and tests.

The images show four flat shapes, which a small detector learns from scratch in minutes. They
depend on the seed alone.
"""
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, List, Optional, Union

import cv2
import numpy as np

from mmgcp.utils.checks import SEED, check_value, number_in

from .demo_images import CLASSES, DemoObject, render_image
from .voc import ANNOTATION_DIR, IMAGE_DIR, LAYOUT, SPLIT_DIR, check_voc

OPTIONS_FILE = 'dataset.json'
FORMAT_VERSION = 3
JPEG_QUALITY = 92

ANNOTATION = """<annotation>
\t<folder>{folder}</folder>
\t<filename>{filename}</filename>
\t<source>
\t\t<database>mmgcp demo</database>
\t</source>
\t<size>
\t\t<width>{width}</width>
\t\t<height>{height}</height>
\t\t<depth>3</depth>
\t</size>
\t<segmented>0</segmented>
{objects}</annotation>
"""

OBJECT = """\t<object>
\t\t<name>{name}</name>
\t\t<pose>Unspecified</pose>
\t\t<truncated>{truncated}</truncated>
\t\t<difficult>0</difficult>
\t\t<bndbox>
\t\t\t<xmin>{xmin}</xmin>
\t\t\t<ymin>{ymin}</ymin>
\t\t\t<xmax>{xmax}</xmax>
\t\t\t<ymax>{ymax}</ymax>
\t\t</bndbox>
\t</object>
"""


@dataclass(frozen=True)
class DemoOptions:
    """What to draw.

    Attributes:
        num_train (int): Number of images in train.txt. Defaults to 240.
        num_val (int): Number of images in val.txt; trainval.txt has both. Defaults to 80.
        num_test (int): Number of images in test.txt. Defaults to 80.
        size (int): Longer side of an image in pixels, 128 to 2048. Defaults to 320.
        seed (int): The same seed gives the same bytes. Defaults to 0.

    Raises:
        UserError: An option is out of its range.
    """

    num_train: int = 240
    num_val: int = 80
    num_test: int = 80
    size: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('num_train', 'num_val', 'num_test'):
            check_value(name, getattr(self, name), number_in(1, 10**6, integer=True))
        check_value('size', self.size, number_in(128, 2048, integer=True))
        check_value('seed', self.seed, SEED)


def make_demo_dataset(out_dir: Union[str, Path], options: Optional[DemoOptions] = None) -> bool:
    """Draw the data set, unless there is a complete one with the same options.

    It is written to a folder next to ``out_dir`` that is renamed at the end, so that
    ``out_dir`` is either complete or absent.

    Args:
        out_dir (str | Path): The folder to make.
        options (DemoOptions, optional): What to draw. Defaults to None: all defaults.

    Returns:
        bool: Whether anything was drawn.

    Raises:
        FileExistsError: ``out_dir`` exists and is anything else.
    """
    out_dir = Path(out_dir).absolute()
    options = DemoOptions() if options is None else options
    if out_dir.exists() or out_dir.is_symlink():
        _check_same(out_dir, options)
        return False
    temporary = out_dir.with_name(f'.{out_dir.name}.{os.getpid()}.tmp')
    try:
        _write_dataset(temporary, options)
        os.rename(str(temporary), str(out_dir))
    finally:
        shutil.rmtree(str(temporary), ignore_errors=True)
    return True


def _check_same(out_dir: Path, options: DemoOptions) -> None:
    """Raise a FileExistsError unless ``out_dir`` is a complete data set with these options."""
    advice = 'Choose another folder or remove it.'
    path = out_dir / OPTIONS_FILE
    if not path.is_file():
        raise FileExistsError(f'{out_dir} exists and is not a demo data set. {advice}')
    try:
        found = json.loads(path.read_text())
        splits = check_voc(out_dir).splits
    except ValueError as error:  # VOCError and JSONDecodeError are ValueErrors
        raise FileExistsError(f'{out_dir} is a damaged demo data set: {error} {advice}') from error
    if found != _describe(options):
        raise FileExistsError(f'{out_dir} is a demo data set with other options: {found}. {advice}')
    expected = {name: len(ids) for name, ids in _split_ids(options).items()}
    if splits != expected:
        raise FileExistsError(
            f'{out_dir} is a damaged demo data set: its image sets have {splits} images '
            f'instead of {expected}. {advice}')


def _describe(options: DemoOptions) -> dict:
    return dict(format_version=FORMAT_VERSION, classes=list(CLASSES), **asdict(options))


def _split_ids(options: DemoOptions) -> Dict[str, List[str]]:
    numbers = (options.num_train, options.num_val, options.num_test)
    ids = [f'{index:06d}' for index in range(sum(numbers))]
    train_end, val_end = options.num_train, options.num_train + options.num_val
    return dict(
        train=ids[:train_end], val=ids[train_end:val_end], trainval=ids[:val_end],
        test=ids[val_end:])


def _write_dataset(root: Path, options: DemoOptions) -> None:
    for name in LAYOUT:
        (root / name).mkdir(parents=True)
    splits = _split_ids(options)
    for name, ids in splits.items():
        (root / SPLIT_DIR / f'{name}.txt').write_text(''.join(f'{i}\n' for i in ids))
    for image_id in splits['trainval'] + splits['test']:
        # With a generator of its own, an image does not depend on those before it
        rng = np.random.default_rng([options.seed, int(image_id)])
        _write_example(root, image_id, *render_image(rng, options.size))
    text = json.dumps(_describe(options), indent=2)
    (root / OPTIONS_FILE).write_text(f'{text}\n')


def _write_example(root: Path, image_id: str, image: np.ndarray,
                   objects: List[DemoObject]) -> None:
    filename = f'{image_id}.jpg'
    path = root / IMAGE_DIR / filename
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(f'could not write {path}')
    height, width = image.shape[:2]
    text = ANNOTATION.format(
        folder=IMAGE_DIR, filename=filename, width=width, height=height,
        objects=''.join(_format_object(item) for item in objects))
    (root / ANNOTATION_DIR / f'{image_id}.xml').write_text(text)


def _format_object(item: DemoObject) -> str:
    xmin, ymin, xmax, ymax = (value + 1 for value in item.box)
    truncated = int(item.visible.sum() < 0.97 * item.area)
    return OBJECT.format(
        name=item.name, truncated=truncated, xmin=xmin, ymin=ymin, xmax=xmax, ymax=ymax)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Draws a small detection data set in PASCAL VOC's format, for demonstrations and tests.

Six flat shapes lie on varied backgrounds at several scales and angles. A small detector
learns them from scratch in minutes, and the images depend on the seed alone.
"""
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import cv2
import numpy as np

from .voc import ANNOTATION_DIR, IMAGE_DIR, LAYOUT, SPLIT_DIR, inspect_voc

CLASSES = ('cross', 'disc', 'square', 'triangle')
# Each class keeps to a range of hues, so that a small detector learns it in a short time
HUE_SPREAD = 18.  # degrees to both sides
OPTIONS_FILE = 'dataset.json'
FORMAT_VERSION = 3
# Sides of an object as fractions of the image's longer side: 26 and 128 pixels of 320
MIN_SIDE = 0.08
MAX_SIDE = 0.4
MIN_OBJECTS = 4
MAX_OBJECTS = 9
MAX_ATTEMPTS = 60
MAX_IOU = 0.2
MIN_VISIBLE = 0.78
MIN_CONTRAST = 110.0
SUPERSAMPLING = 4
JPEG_QUALITY = 92

Box = Tuple[int, int, int, int]

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
        num_train (int): Images of train.txt.
        num_val (int): Images of val.txt; trainval.txt has both.
        num_test (int): Images of test.txt.
        size (int): Longer side of an image in pixels.
        seed (int): The same seed gives the same bytes.
    """

    num_train: int = 240
    num_val: int = 80
    num_test: int = 80
    size: int = 320
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ('num_train', 'num_val', 'num_test'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, but got {getattr(self, name)}.')
        if not 128 <= self.size <= 2048:
            raise ValueError(f'size must be from 128 to 2048, but got {self.size}.')
        if self.seed < 0:
            raise ValueError(f'seed must not be negative, but got {self.seed}.')


@dataclass
class DemoObject:
    """One object of an image.

    Attributes:
        name (str): Its class.
        visible (np.ndarray): The pixels (H, W) of it that nothing covers, bool.
        area (float): Its pixels when nothing covers or cuts it.
    """

    name: str
    visible: np.ndarray
    area: float

    @property
    def box(self) -> Box:
        return mask_to_box(self.visible)

    def visible_without(self, mask: np.ndarray) -> float:
        """Fraction of the object that is seen once ``mask`` covers it too."""
        return float((self.visible & ~mask).sum()) / self.area


def make_demo_dataset(out_dir: Union[str, Path], options: Optional[DemoOptions] = None) -> bool:
    """Draw the data set, or leave a complete one of the same options as it is.

    All is written into a folder beside ``out_dir`` that is renamed at the end, so
    ``out_dir`` is either complete or absent.

    Args:
        out_dir (str | Path): The folder to make.
        options (DemoOptions, optional): What to draw. The defaults if not given.

    Returns:
        bool: Whether anything was drawn.

    Raises:
        FileExistsError: ``out_dir`` exists and is something else.
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


def render_image(rng: np.random.Generator, size: int) -> Tuple[np.ndarray, List[DemoObject]]:
    """Draw one image.

    Args:
        rng (np.random.Generator): Source of all choices.
        size (int): Longer side in pixels.

    Returns:
        tuple[np.ndarray, list[DemoObject]]: The image (H, W, 3), BGR uint8, and 1 to 9
        objects.
    """
    image = draw_background(rng, *_choose_shape(rng, size))
    objects = []
    wanted, attempts = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1)), 0
    while not objects or (len(objects) < wanted and attempts < MAX_ATTEMPTS):
        _try_object(rng, image, objects, size)
        attempts += 1
    return _add_lighting(rng, image), objects


def shape_mask(name: str, center: Sequence[float], side: float, angle: float, stretch: float,
               image_shape: Tuple[int, int]) -> np.ndarray:
    """Draw a shape's coverage of each pixel.

    Args:
        name (str): One of ``CLASSES``.
        center (Sequence[float]): x and y of the middle of its box. The top left pixel
            spans 0 to 1.
        side (float): Shorter side of its box in pixels.
        angle (float): Rotation in radians.
        stretch (float): Width over height before the rotation.
        image_shape (tuple[int, int]): Height and width of the image.

    Returns:
        np.ndarray: Coverage (H, W) from 0 to 1, float32.
    """
    contours = [_rotate(contour, angle, stretch) for contour in _contours(name)]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    scale = side / (high - low).min()
    contours = [(contour - (low + high) / 2) * scale + center for contour in contours]
    # fillPoly takes integers and paints the pixels on the outline too, hence the half
    fine = [np.round(contour * SUPERSAMPLING - 0.5).astype(np.int32) for contour in contours]
    height, width = image_shape
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, fine, 255)
    mask = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return mask.astype(np.float32) / 255


def mask_to_box(mask: np.ndarray) -> Box:
    """Find the tightest box of a bool mask (H, W), whose four sides belong to it.

    Returns:
        tuple[int, int, int, int]: xmin, ymin, xmax, ymax, counted from zero.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        raise ValueError('An empty mask has no box.')
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def paint(image: np.ndarray, mask: np.ndarray, color: Sequence[float]) -> None:
    """Lay a colour over a float32 image (H, W, 3) in place, as far as ``mask`` covers it."""
    image += mask[..., None] * (np.asarray(color, np.float32) - image)


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a texture of one of five kinds with some thin lines, float32 (H, W, 3)."""
    base = rng.uniform(30, 225, 3)
    tint = rng.normal(0, 1, 3) + rng.choice([-1.5, 1.5])
    color = tint / np.abs(tint).max() * rng.uniform(12, 38)
    kind = TEXTURES[int(rng.integers(len(TEXTURES)))]
    texture = kind(rng, height, width)[..., None]
    image = np.clip(base + texture * color, 0, 255).astype(np.float32)
    _draw_clutter(rng, image)
    return image


def _gradient(rng, height, width):
    across, _ = _turned_grid(rng, height, width)
    return 2 * (across - across.min()) / (across.max() - across.min()) - 1


def _stripes(rng, height, width):
    across, _ = _turned_grid(rng, height, width)
    return np.sin(across * 2 * np.pi / rng.uniform(10, 60))


def _checker(rng, height, width):
    period = rng.uniform(10, 50)
    across, along = _turned_grid(rng, height, width)
    return np.where((np.floor(across / period) + np.floor(along / period)) % 2, 1.0, -1.0)


def _clouds(rng, height, width):
    texture = np.zeros((height, width), np.float32)
    for cells in (3, 6, 12, 24):
        coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
        texture += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) / cells
    return texture / np.abs(texture).max()


def _grain(rng, height, width):
    grain = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), rng.uniform(0.6, 2.5))
    return np.clip(grain / (2 * grain.std()), -1, 1)


TEXTURES = (_gradient, _stripes, _checker, _clouds, _grain)


def _turned_grid(rng, height, width):
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return (x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))


def _draw_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw thin lines and open arcs, which belong to no class."""
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(0, 7))):
        points = (rng.uniform(0, 1, (2, 2)) * (width, height)).astype(int)
        start, end = (tuple(int(value) for value in point) for point in points)
        color = np.clip(image[start[1], start[0]] + rng.uniform(-70, 70, 3), 0, 255).tolist()
        thickness = int(rng.integers(1, 4))
        if rng.random() < 0.7:
            cv2.line(image, start, end, color, thickness, cv2.LINE_AA)
            continue
        axes = tuple(int(value) for value in rng.integers(width // 10, width // 3, 2))
        turn, sweep = rng.uniform(0, 360), rng.uniform(40, 150)
        cv2.ellipse(image, start, axes, turn, 0, sweep, color, thickness, cv2.LINE_AA)


def _choose_shape(rng: np.random.Generator, size: int) -> Tuple[int, int]:
    other = int(round(size * rng.choice([0.75, 0.85, 1.0])))
    return (size, other) if rng.random() < 0.3 else (other, size)


def _try_object(rng: np.random.Generator, image: np.ndarray, objects: List[DemoObject],
                size: int) -> None:
    """Add an object at a random place, unless too little of it or others stays visible."""
    name = CLASSES[int(rng.integers(len(CLASSES)))]
    height, width = image.shape[:2]
    side = size * np.exp(rng.uniform(np.log(MIN_SIDE * 1.05), np.log(MAX_SIDE)))
    center = rng.uniform(0, 1, 2) * (width, height)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    coverage = shape_mask(name, center, side, angle, stretch, (height, width))
    # The same shape in a canvas around it tells how much of it the border cuts off
    canvas = int(np.ceil(2 * side)) + 2
    whole = shape_mask(name, (canvas / 2, canvas / 2), side, angle, stretch, (canvas, canvas))
    new = DemoObject(name, coverage >= 0.5, float((whole >= 0.5).sum()))
    if not _fits(new, objects, MIN_SIDE * size):
        return
    for other in objects:
        other.visible &= ~new.visible
    objects.append(new)
    paint(image, coverage, _choose_color(rng, name, image, coverage))


def _fits(new: DemoObject, objects: List[DemoObject], min_side: float) -> bool:
    if new.visible_without(np.zeros_like(new.visible)) < MIN_VISIBLE:
        return False
    if _shorter_side(new.box) < min_side:
        return False
    for other in objects:
        if other.visible_without(new.visible) < MIN_VISIBLE:
            return False
        box = mask_to_box(other.visible & ~new.visible)
        if _shorter_side(box) < min_side or box_iou(new.box, box) >= MAX_IOU:
            return False
    return True


def _shorter_side(box: Box) -> int:
    return min(box[2] - box[0], box[3] - box[1]) + 1


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes whose sides belong to them."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    inside = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
    return inside / (sum(areas) - inside)


def _choose_color(rng: np.random.Generator, name: str, image: np.ndarray,
                  coverage: np.ndarray) -> np.ndarray:
    """Choose the shape's colours (H, W, 3), far from what it covers and what is around."""
    class_hue = 360 * CLASSES.index(name) / len(CLASSES)
    kernel = np.ones((9, 9), np.uint8)
    near = image[cv2.dilate((coverage > 0).astype(np.uint8), kernel) > 0]
    behind = np.percentile(near, (10, 50, 90), axis=0)
    best, contrast = None, -1.0
    for _ in range(30):
        hue = (class_hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 360
        hsv = np.float32([[[hue, rng.uniform(0.6, 1), rng.uniform(0.45, 1)]]])
        color = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]
        # Half of the distance is brightness, as colours of equal brightness look alike
        tint = np.linalg.norm(behind - color, axis=1)
        distance = (tint / 2 + abs((behind - color).mean(axis=1))).min()
        if distance > contrast:
            best, contrast = color, distance
        if contrast >= MIN_CONTRAST:
            break
    shading = _gradient(rng, *coverage.shape)[..., None] * rng.uniform(0, 25)
    return np.clip(best + shading, 0, 255)


def _add_lighting(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Brighten one side, blur some images a little, add sensor noise; returns uint8."""
    height, width = image.shape[:2]
    light = rng.uniform(0.8, 1.1) + rng.uniform(0, 0.2) * _gradient(rng, height, width)
    image = image * light[..., None]
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    noise = rng.normal(0, rng.uniform(1, 7), image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def _contours(name: str) -> List[np.ndarray]:
    """The outlines (N, 2) of a shape about the origin."""
    if name == 'disc':
        return [_polygon([1.0] * 72)]
    if name == 'square':
        # On its side, so that stretching makes a rectangle
        return [_rotate(_polygon([1.0] * 4), np.pi / 4, 1.0)]
    if name == 'triangle':
        return [_polygon([1.0] * 3)]
    if name == 'cross':
        arm = 0.34
        quarter = np.array([(arm, 1), (arm, arm), (1, arm)], np.float64)
        turns = [_rotate(quarter, -turn * np.pi / 2, 1.0) for turn in range(4)]
        return [np.concatenate(turns)]
    raise ValueError(f'The shape must be one of {", ".join(CLASSES)}, but got {name!r}.')


def _polygon(radii: Sequence[float]) -> np.ndarray:
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


def _rotate(points: np.ndarray, angle: float, stretch: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return (points * (stretch, 1.0)) @ np.array([(cos, sin), (-sin, cos)])


def _check_same(out_dir: Path, options: DemoOptions) -> None:
    """Raise FileExistsError unless ``out_dir`` is a complete data set of these options."""
    advice = 'Choose another folder or remove it.'
    path = out_dir / OPTIONS_FILE
    if not path.is_file():
        raise FileExistsError(f'{out_dir} exists and is not a demo data set. {advice}')
    try:
        found = json.loads(path.read_text())
        splits = inspect_voc(out_dir).splits
    except ValueError as error:  # of which VOCError and JSONDecodeError are kinds
        raise FileExistsError(f'{out_dir} is a damaged demo data set: {error} {advice}') from error
    if found != _describe(options):
        raise FileExistsError(f'{out_dir} is a demo data set of other options: {found}. {advice}')
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
        # A generator of its own makes an image independent of those before it
        rng = np.random.default_rng([options.seed, int(image_id)])
        _write_example(root, image_id, *render_image(rng, options.size))
    text = json.dumps(_describe(options), indent=2)
    (root / OPTIONS_FILE).write_text(f'{text}\n')


def _write_example(root: Path, image_id: str, image: np.ndarray,
                   objects: List[DemoObject]) -> None:
    filename = f'{image_id}.jpg'
    path = root / IMAGE_DIR / filename
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(f'Could not write {path}.')
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

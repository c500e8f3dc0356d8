# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Draws the demo images: flat shapes on varied backgrounds at several scales and angles."""
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import cv2
import numpy as np

from .demo_backgrounds import draw_background, draw_gradient

CLASSES = ('cross', 'disc', 'square', 'triangle')
# Each class has a range of hues of its own, so that a small detector learns it in a short time
HUE_SPREAD = 18.  # degrees to both sides
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

Box = Tuple[int, int, int, int]


@dataclass
class DemoObject:
    """One object of an image.

    Attributes:
        name (str): Its class.
        visible (np.ndarray): Mask (H, W) of its pixels that nothing covers.
        area (float): Number of its pixels if nothing covered it and no border cut it off.
    """

    name: str
    visible: np.ndarray
    area: float

    @property
    def box(self) -> Box:
        """tuple[int, int, int, int]: The tightest box of the visible pixels."""
        return mask_to_box(self.visible)

    def visible_without(self, mask: np.ndarray) -> float:
        """Return the fraction of the object that stays visible if a mask covers it, too."""
        return float((self.visible & ~mask).sum()) / self.area


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


def _choose_shape(rng: np.random.Generator, size: int) -> Tuple[int, int]:
    other = int(round(size * rng.choice([0.75, 0.85, 1.0])))
    return (size, other) if rng.random() < 0.3 else (other, size)


def _try_object(rng: np.random.Generator, image: np.ndarray, objects: List[DemoObject],
                size: int) -> None:
    """Add an object at a random place, unless too little of it or of another stays visible."""
    name = CLASSES[int(rng.integers(len(CLASSES)))]
    height, width = image.shape[:2]
    side = size * np.exp(rng.uniform(np.log(MIN_SIDE * 1.05), np.log(MAX_SIDE)))
    center = rng.uniform(0, 1, 2) * (width, height)
    angle, stretch = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.18)
    coverage = shape_mask(name, center, side, angle, stretch, (height, width))
    # The whole shape on a canvas of its own shows how much of it the border cuts off
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
    """Whether enough of all objects stays visible, and their boxes overlap little."""
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
    """Compute the intersection over union of two boxes, whose last pixels belong to them."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + 1
    height = min(first[3], second[3]) - max(first[1], second[1]) + 1
    inside = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (first, second)]
    return inside / (sum(areas) - inside)


def _choose_color(rng: np.random.Generator, name: str, image: np.ndarray,
                  coverage: np.ndarray) -> np.ndarray:
    """Choose the shape's colours (H, W, 3), in contrast to what it covers and what is around."""
    class_hue = 360 * CLASSES.index(name) / len(CLASSES)
    kernel = np.ones((9, 9), np.uint8)
    near = image[cv2.dilate((coverage > 0).astype(np.uint8), kernel) > 0]
    behind = np.percentile(near, (10, 50, 90), axis=0)
    best, contrast = None, -1.0
    for _ in range(30):
        hue = (class_hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 360
        hsv = np.float32([[[hue, rng.uniform(0.6, 1), rng.uniform(0.45, 1)]]])
        color = 255 * cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0]
        # Brightness makes up half of the distance, because equally bright colours look alike
        tint = np.linalg.norm(behind - color, axis=1)
        distance = (tint / 2 + abs((behind - color).mean(axis=1))).min()
        if distance > contrast:
            best, contrast = color, distance
        if contrast >= MIN_CONTRAST:
            break
    shading = draw_gradient(rng, *coverage.shape)[..., None] * rng.uniform(0, 25)
    return np.clip(best + shading, 0, 255)


def _add_lighting(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Brighten one side, blur some images a little and add sensor noise; returns uint8."""
    height, width = image.shape[:2]
    light = rng.uniform(0.8, 1.1) + rng.uniform(0, 0.2) * draw_gradient(rng, height, width)
    image = image * light[..., None]
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 0.9))
    noise = rng.normal(0, rng.uniform(1, 7), image.shape)
    return np.clip(np.round(image + noise), 0, 255).astype(np.uint8)


def shape_mask(name: str, center: Sequence[float], side: float, angle: float, stretch: float,
               image_shape: Tuple[int, int]) -> np.ndarray:
    """Draw how much of each pixel a shape covers.

    Args:
        name (str): One of ``CLASSES``.
        center (Sequence[float]): x and y of the middle of its box in pixels. The top left
            pixel spans 0 to 1.
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
    # Minus a half, because fillPoly takes integers and also paints the pixels on the outline
    fine = [np.round(contour * SUPERSAMPLING - 0.5).astype(np.int32) for contour in contours]
    height, width = image_shape
    canvas = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), np.uint8)
    cv2.fillPoly(canvas, fine, 255)
    mask = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return mask.astype(np.float32) / 255


def _contours(name: str) -> List[np.ndarray]:
    """The outlines (N, 2) of a shape around the origin."""
    if name == 'disc':
        return [_polygon([1.0] * 72)]
    if name == 'square':
        # With horizontal and vertical sides, so that stretching makes a rectangle
        return [_rotate(_polygon([1.0] * 4), np.pi / 4, 1.0)]
    if name == 'triangle':
        return [_polygon([1.0] * 3)]
    if name == 'cross':
        arm = 0.34
        quarter = np.array([(arm, 1), (arm, arm), (1, arm)], np.float64)
        turns = [_rotate(quarter, -turn * np.pi / 2, 1.0) for turn in range(4)]
        return [np.concatenate(turns)]
    raise ValueError(f'the shape must be one of {", ".join(CLASSES)}, but got {name!r}')


def _polygon(radii: Sequence[float]) -> np.ndarray:
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.asarray(radii)[:, None]


def _rotate(points: np.ndarray, angle: float, stretch: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return (points * (stretch, 1.0)) @ np.array([(cos, sin), (-sin, cos)])


def mask_to_box(mask: np.ndarray) -> Box:
    """Find the tightest box of a boolean mask (H, W). The last row and column belong to it.

    Returns:
        tuple[int, int, int, int]: xmin, ymin, xmax, ymax, counted from zero.
    """
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not len(columns):
        raise ValueError('an empty mask has no box')
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def paint(image: np.ndarray, mask: np.ndarray, color: Sequence[float]) -> None:
    """Blend a colour into a float32 image (H, W, 3) in place, with a mask (H, W) from 0 to 1."""
    image += mask[..., None] * (np.asarray(color, np.float32) - image)

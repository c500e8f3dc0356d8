# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Backgrounds of the demo images: textures of several kinds with thin lines."""
import cv2
import numpy as np


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a background.

    Args:
        rng (np.random.Generator): Source of all choices.
        height (int): Height in pixels.
        width (int): Width in pixels.

    Returns:
        np.ndarray: A texture of one of five kinds with some thin lines, (H, W, 3), float32.
    """
    base = rng.uniform(30, 225, 3)
    tint = rng.normal(0, 1, 3) + rng.choice([-1.5, 1.5])
    color = tint / np.abs(tint).max() * rng.uniform(12, 38)
    kind = TEXTURES[int(rng.integers(len(TEXTURES)))]
    texture = kind(rng, height, width)[..., None]
    image = np.clip(base + texture * color, 0, 255).astype(np.float32)
    _draw_clutter(rng, image)
    return image


def draw_gradient(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a linear gradient (H, W) from -1 to 1 in a random direction."""
    across, _ = _rotated_grid(rng, height, width)
    return 2 * (across - across.min()) / (across.max() - across.min()) - 1


def _stripes(rng, height, width):
    across, _ = _rotated_grid(rng, height, width)
    return np.sin(across * 2 * np.pi / rng.uniform(10, 60))


def _checker(rng, height, width):
    period = rng.uniform(10, 50)
    across, along = _rotated_grid(rng, height, width)
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


TEXTURES = (draw_gradient, _stripes, _checker, _clouds, _grain)


def _rotated_grid(rng, height, width):
    angle = rng.uniform(0, np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return (x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle))


def _draw_clutter(rng: np.random.Generator, image: np.ndarray) -> None:
    """Draw thin lines and open arcs that belong to no class."""
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
        rotation, sweep = rng.uniform(0, 360), rng.uniform(40, 150)
        cv2.ellipse(image, start, axes, rotation, 0, sweep, color, thickness, cv2.LINE_AA)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The colours of a picture, and those that Matplotlib gives to groups."""
import cv2
import numpy as np
from matplotlib import colormaps


def colours(path):
    """Pixels of each colour, as (red, green, blue)."""
    pixels = cv2.imread(str(path))[..., ::-1].reshape(-1, 3)
    values, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(value): count for value, count in zip(values.tolist(), counts.tolist())}


def palette(number):
    """The colour of this number of ten, as (red, green, blue)."""
    return tuple(round(255 * part) for part in colormaps['tab10'](number)[:3])

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def draw_gamma_histogram(values: np.ndarray, near_zero_thr: float, title: str) -> np.ndarray:
    """Draw the distribution of scale factors, counts on a logarithmic axis.

    Args:
        values (np.ndarray): The scale factors, of shape (n, ).
        near_zero_thr (float): Marked on both sides of zero.
        title (str): The first line of the title.

    Returns:
        np.ndarray: RGB image of shape (480, 640, 3), uint8.
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.hist(values, bins=100, log=True)
    for threshold in (-near_zero_thr, near_zero_thr):
        axes.axvline(threshold, color='tab:red', linestyle='--', linewidth=0.8)
    share = np.mean(np.abs(values) < near_zero_thr)
    axes.set_title(f'{title}\n{share:.1%} of {values.size} channels below {near_zero_thr:g}')
    axes.set_xlabel('BatchNorm scale factor')
    axes.set_ylabel('channels')
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()

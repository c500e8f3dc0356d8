# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the hook logs about the scale factors: figures and histograms."""
from typing import Dict, Union

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch import Tensor

from .channels import Channels


def summarize(channels: Channels, rates: Union[float, Tensor], near_zero_thr: float,
              by_group: bool) -> Dict[str, float]:
    """Compute the figures to log, by name; ``by_group`` adds the shares of the layer groups.

    Scale factors below ``near_zero_thr`` count as near zero; rates may be one for each channel
    (n, ).
    """
    values = channels.values()
    magnitudes = channels.magnitudes(values)
    rates = torch.as_tensor(rates).to(magnitudes)
    near_zero = values.abs() < near_zero_thr
    figures = dict(
        sparsity_rate=rates.mean().item(),
        sparsity_loss=(rates * magnitudes).sum().item(),
        sparsity_near_zero=near_zero.float().mean().item())
    if by_group:
        near_zero = near_zero.cpu()
        for name, mask in channels.groups.items():
            figures[f'sparsity_near_zero/{name}'] = near_zero[mask].float().mean().item()
    return figures


def show_histograms(visualizer: Visualizer, channels: Channels, near_zero_thr: float,
                    title: str, step: int, by_group: bool) -> None:
    """Pass the distribution of the scale factors to the visualizer, as number ``step``.

    It gets a picture and, with TensorBoard, histograms, also of each layer group if
    ``by_group``. The first line of the picture's title is given.
    """
    values = channels.values().float().cpu()
    image = draw_gamma_histogram(values.numpy(), near_zero_thr, title)
    # No slash in the name: the local backend would take it for a folder and fail.
    visualizer.add_image('sparsity_gamma_histogram', image, step=step)
    histograms = {'sparsity/gamma': values}
    if by_group:
        histograms.update((f'sparsity/gamma/{name}', values[mask])
                          for name, mask in channels.groups.items())
    for backend in visualizer._vis_backends.values():
        if isinstance(backend, TensorboardVisBackend):
            for name, chosen in histograms.items():
                backend.experiment.add_histogram(name, chosen.numpy(), step)


def draw_gamma_histogram(values: np.ndarray, near_zero_thr: float, title: str) -> np.ndarray:
    """Draw the distribution of scale factors (n, ) with a logarithmic axis for the counts.

    The threshold is marked on both sides of zero. Returns an RGB image (480, 640, 3), uint8.
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    finite = values[np.isfinite(values)]
    axes.hist(finite, bins=100, log=True)
    for threshold in (-near_zero_thr, near_zero_thr):
        axes.axvline(threshold, color='tab:red', linestyle='--', linewidth=0.8)
    share = np.mean(np.abs(values) < near_zero_thr)
    others = f', {values.size - finite.size} not finite' if finite.size < values.size else ''
    axes.set_title(
        f'{title}\n{share:.1%} of {values.size} channels below {near_zero_thr:g}{others}')
    axes.set_xlabel('BatchNorm scale factor')
    axes.set_ylabel('channels')
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3].copy()

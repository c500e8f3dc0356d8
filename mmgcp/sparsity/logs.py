# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the hook tells about the scale factors."""
from typing import Dict, Union

import torch
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch import Tensor

from .channels import Channels
from .drawing import draw_gamma_histogram


def summarize(channels: Channels, rates: Union[float, Tensor], near_zero_thr: float,
              by_group: bool) -> Dict[str, float]:
    """The figures of the moment.

    Args:
        channels (Channels): The channels.
        rates (float | Tensor): Their rates (n, ).
        near_zero_thr (float): Below it a magnitude counts as near zero.
        by_group (bool): Whether to tell the share of near-zero channels of each group, too.

    Returns:
        dict[str, float]: Values by name.
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
    """Give the distribution of the scale factors to the visualizer.

    Args:
        visualizer (Visualizer): Gets a picture, and with TensorBoard histograms.
        channels (Channels): The channels.
        near_zero_thr (float): Marked on both sides of zero.
        title (str): The first line of the picture's title.
        step (int): Number of the picture.
        by_group (bool): Whether TensorBoard gets a histogram of each group, too.
    """
    values = channels.values().float().cpu()
    image = draw_gamma_histogram(values.numpy(), near_zero_thr, title)
    # No slash in the name: the local backend would take it for a folder, and fail.
    visualizer.add_image('sparsity_gamma_histogram', image, step=step)
    histograms = {'sparsity/gamma': values}
    if by_group:
        histograms.update((f'sparsity/gamma/{name}', values[mask])
                          for name, mask in channels.groups.items())
    for backend in visualizer._vis_backends.values():
        if isinstance(backend, TensorboardVisBackend):
            for name, chosen in histograms.items():
                backend.experiment.add_histogram(name, chosen.numpy(), step)

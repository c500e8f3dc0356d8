# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The trainings of several stages, side by side."""
import math
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .plots import BEFORE_COLOR, NO_GROUP_COLOR, Color, group_colors, save_figure

FEW = 30  # so many points are marked
SPREAD = 10  # from this ratio of the greatest to the least loss on, the axis is logarithmic


class StageCurve(NamedTuple):
    """What is known of the training of a stage.

    Attributes:
        name (str): Its name.
        epochs (Sequence[float]): Where the losses were logged, in epochs from its beginning.
        losses (Sequence[float]): Loss of the detector itself.
        totals (Sequence[float]): The same with all that was added to it, as by distilling.
        validated (Sequence[tuple[float, float]]): Epoch and accuracy of each validation.
        before (float, optional): Accuracy of what the stage began with.
        after (float, optional): Accuracy of what came of it.
    """
    name: str
    epochs: Sequence[float]
    losses: Sequence[float]
    totals: Sequence[float]
    validated: Sequence[Tuple[float, float]] = ()
    before: Optional[float] = None
    after: Optional[float] = None


def plot_stages(stages: Sequence[StageCurve], metric: str, path: Union[str, Path]) -> None:
    """Plot losses and accuracies over the epochs, with a column for each stage.

    Args:
        stages (Sequence[StageCurve]): The stages, one at least, in their order.
        metric (str): What the accuracy is called.
        path (str | Path): The PNG file to write.
    """
    figure = Figure(figsize=(1.5 + 3.4 * len(stages), 5.5), layout='constrained')
    grid = figure.subplots(2, len(stages), sharex='col', sharey='row', squeeze=False)
    colors = group_colors(stage.name for stage in stages)
    for (top, bottom), stage in zip(grid.T, stages):
        color = colors[stage.name]
        top.set_title(stage.name, fontsize=11)
        top.plot(stage.epochs, stage.losses, color=color, label='of the detector',
                 marker='.' if len(stage.epochs) < FEW else '')
        if not np.allclose(stage.totals, stage.losses, rtol=1e-3, equal_nan=True):
            top.plot(stage.epochs, stage.totals, color=color, linestyle=':',
                     label='with what is added')
            top.legend(fontsize=8)
        _draw_accuracy(bottom, stage, color)
        bottom.set_xlabel('epoch')
        for axes in (top, bottom):
            axes.set_axisbelow(True)
            axes.grid(color=BEFORE_COLOR, linewidth=0.6)
            axes.set_xlim(0, 1.06 * _end(stage))
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    grid[0, 0].set_ylabel('loss')
    grid[1, 0].set_ylabel(metric)
    grid[1, 0].set_ylim(0, 1.15 * max([value for stage in stages for _, value in _points(stage)],
                                      default=0.) or 1.)
    values = [value for stage in stages for value in (*stage.losses, *stage.totals)
              if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > SPREAD * min(values):
        grid[0, 0].set_yscale('log')
        for which in (grid[0, 0].yaxis.set_major_formatter, grid[0, 0].yaxis.set_minor_formatter):
            which(FuncFormatter(_log_label))
    elif values:
        grid[0, 0].set_ylim(min(0., min(values)), 1.05 * max(values) or 1.)
    save_figure(figure, path)


def _log_label(value: float, _place: int) -> str:
    """Label 1, 2 and 5 times powers of ten."""
    return f'{value:g}' if f'{value:e}'[0] in '125' else ''


def _end(stage: StageCurve) -> float:
    """The epoch at which a stage ends, as far as is known."""
    return max(math.ceil(max([*stage.epochs, *(epoch for epoch, _ in stage.validated)],
                             default=1.)), 1)


def _points(stage: StageCurve) -> List[Tuple[float, float]]:
    """The epochs and accuracies that are known, in their order."""
    ends = [(0., stage.before)], stage.validated, [(float(_end(stage)), stage.after)]
    return [(epoch, value) for points in ends for epoch, value in points
            if value is not None and math.isfinite(value)]


def _draw_accuracy(axes: Axes, stage: StageCurve, color: Color) -> None:
    """Draw what is known, with numbers at both ends; dashed where nothing is known between."""
    points = _points(stage)
    axes.plot(*zip(*points) if points else ((), ()), color=color, marker='o', markersize=5,
              linestyle='-' if stage.validated else '--', clip_on=False)
    for epoch, value in {(0., stage.before), (float(_end(stage)), stage.after)} & set(points):
        axes.annotate(f'{value:.3f}', (epoch, value), fontsize=8, color=NO_GROUP_COLOR,
                      xytext=(4 if epoch == 0 else -4, 6), textcoords='offset points',
                      ha='left' if epoch == 0 else 'right', zorder=4,
                      bbox=dict(facecolor='white', alpha=0.8, edgecolor='none', pad=0.5))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Plots of sparse training and pruning, as PNG files."""
from pathlib import Path
from typing import Dict, Iterable, List, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmgcp.errors import UserError

BEFORE_COLOR = '#d8dde3'
NO_GROUP_COLOR = '#555555'
Color = Union[str, Tuple[float, float, float, float]]  # as Matplotlib takes it
MARKERS = 'os^DvPX*'  # of detectors


def check_picture(path: Union[str, Path]) -> None:
    """Check that a picture can be written to a path before anything is computed for it.

    Args:
        path (str | Path): The picture.

    Raises:
        UserError: Its ending is that of no kind of picture, or its folder does not exist.
    """
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        raise UserError(f'the picture {path} must end in one of {", ".join(sorted(kinds))}')
    if not Path(path).parent.is_dir():
        raise UserError(f'there is no folder {Path(path).parent} for the picture {path}')


def plot_channels(layers: Sequence[str], before: Sequence[int], after: Sequence[int],
                  groups: Sequence[str], path: Union[str, Path]) -> None:
    """Plot the number of channels of each layer before and after pruning.

    Args:
        layers (Sequence[str]): Names of the layers, in the order of the model.
        before (Sequence[int]): Number of channels of each layer before.
        after (Sequence[int]): Number of channels of each layer after.
        groups (Sequence[str]): Layer group of each layer, '' for none.
        path (str | Path): The PNG file to write.
    """
    figure = Figure(figsize=(max(8., 0.16 * len(layers)), 5), layout='constrained')
    axes = figure.subplots()
    positions = np.arange(len(layers))
    axes.bar(positions, before, width=0.9, color=BEFORE_COLOR, label='before')
    for name, color in group_colors(groups).items():
        chosen = [index for index, group in enumerate(groups) if group == name]
        axes.bar(positions[chosen], np.asarray(after)[chosen], width=0.9, color=color,
                 label=f'after: {name or "not pruned"}')
    axes.set_xticks(positions, layers, rotation=90, fontsize=5)
    axes.set_xlim(-1, len(layers))
    axes.set_ylabel('output channels')
    axes.set_title('Channels kept per layer')
    figure.legend(fontsize=8, loc='outside right upper')
    save_figure(figure, path)


def plot_score_histograms(scores: Dict[str, Sequence[float]],
                          thresholds: Dict[str, Optional[float]], label: str,
                          path: Union[str, Path]) -> None:
    """Plot a histogram of the scores of each layer group with its threshold.

    Args:
        scores (dict[str, Sequence[float]]): Scores by layer group; those that are not finite are
            only counted.
        thresholds (dict[str, float | None]): Threshold by layer group, None if it has none.
        label (str): Name of the scores, for the axis.
        path (str | Path): The PNG file to write.
    """
    columns = 1 if len(scores) <= 6 else 2
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(8 * columns, 1 + 1.6 * rows), layout='constrained')
    grid: List = list(figure.subplots(rows, columns, sharex=True, squeeze=False).T.flat)
    finite = {name: np.asarray(values)[np.isfinite(values)] for name, values in scores.items()}
    drawn = np.concatenate(list(finite.values()))
    bins = np.linspace(min(0., drawn.min(initial=0.)), drawn.max() if len(drawn) else 1., 80)
    colors = group_colors(scores)
    for axes, (name, values) in zip(grid, scores.items()):
        axes.hist(finite[name], bins=bins, color=colors[name], log=True)
        threshold = thresholds.get(name)
        text = f'{name}: {len(values)} channels'
        if threshold is not None:
            axes.axvline(threshold, color='black', linestyle='--')
            below = np.mean(np.asarray(values) <= threshold) if len(values) else 0
            text += f', {below:.0%} at or below the threshold {threshold:.3g}'
        if len(finite[name]) < len(values):
            text += f', {len(values) - len(finite[name])} not finite'
        axes.set_title(text, fontsize=9, loc='left')
        axes.set_ylabel('channels', fontsize=8)
    for axes in grid[len(scores):]:
        axes.set_axis_off()
    figure.supxlabel(label, fontsize=10)
    save_figure(figure, path)


def plot_sparsity(steps: Sequence[int], near_zero: Dict[str, Sequence[float]],
                  rates: Sequence[float], losses: Sequence[float],
                  path: Union[str, Path]) -> None:
    """Plot how the scale factors approach zero in a sparse training.

    Args:
        steps (Sequence[int]): Iterations.
        near_zero (dict[str, Sequence[float]]): Share of near-zero channels in each of these
            iterations by layer group, '' for all channels.
        rates (Sequence[float]): Sparsity rate in each of these iterations.
        losses (Sequence[float]): Penalty in each of these iterations.
        path (str | Path): The PNG file to write.
    """
    figure = Figure(figsize=(9, 8), layout='constrained')
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    for name, color in group_colors(near_zero).items():
        top.plot(steps, near_zero[name], color=color, label=name or 'all channels',
                 linewidth=1.2 if name else 2.5)
    top.set_ylim(0, 1)
    top.set_ylabel('share of channels near zero')
    middle.plot(steps, rates, color=NO_GROUP_COLOR)
    middle.set_ylabel('sparsity rate (mean)')
    bottom.plot(steps, losses, color=NO_GROUP_COLOR)
    bottom.set_ylabel('penalty')
    bottom.set_xlabel('iteration')
    for axes in (middle, bottom):
        axes.set_ylim(bottom=0)
    for axes in (top, middle, bottom):
        axes.grid(color=BEFORE_COLOR, linewidth=0.6)
    figure.legend(fontsize=8, loc='outside right upper')
    save_figure(figure, path)


def plot_comparison(names: Sequence[str], macs: Sequence[float],
                    latencies: Dict[str, Sequence[Optional[float]]],
                    accuracies: Dict[str, Sequence[Optional[float]]],
                    path: Union[str, Path]) -> None:
    """Plot the accuracy of detectors against their latency and their MACs.

    Where no accuracy is known, it is the latency against the MACs, with a line on which they are
    proportional to those of the first detector.

    Args:
        names (Sequence[str]): The detectors.
        macs (Sequence[float]): MACs for an image.
        latencies (dict[str, Sequence[float | None]]): Milliseconds by what runs them; None where
            they have not been measured.
        accuracies (dict[str, Sequence[float | None]]): In the same way.
        path (str | Path): The PNG file to write.
    """
    known = any(value is not None for values in accuracies.values() for value in values)
    figure = Figure(figsize=(11 if known else 7, 4.5), layout='constrained')
    panels = list(figure.subplots(1, 2, sharey=True)) if known else [figure.subplots()]
    colors, giga = group_colors(latencies), [value / 1e9 for value in macs]
    for kind, times in latencies.items():
        if known:
            pairs = [(times, accuracies[kind]), (giga, accuracies[kind])]
        else:
            pairs = [(giga, times)]
            if times[0] is not None:
                panels[0].plot([0, giga[0]], [0, times[0]], color=colors[kind], linestyle=':')
        for axes, (across, up) in zip(panels, pairs):
            _mark(axes, across, up, colors[kind])
    labels = ('ms for an image', 'GMACs') if known else ('GMACs', )
    for axes, label in zip(panels, labels):
        axes.set_xlabel(label)
        axes.set_xlim(0, 1.08 * axes.dataLim.xmax)
        axes.set_axisbelow(True)
        axes.grid(color=BEFORE_COLOR, linewidth=0.6)
    panels[0].set_ylabel('accuracy' if known else 'ms for an image (dotted: as MACs promise)')
    panels[0].set_ylim(0, 1.08 * max([axes.dataLim.ymax for axes in panels]) or 1)
    handles = [Line2D([], [], color=colors[kind], label=kind, linewidth=4)
               for kind, times in latencies.items() if any(time is not None for time in times)]
    handles += [Line2D([], [], color=NO_GROUP_COLOR, linestyle='', marker=_marker(number),
                       label=name) for number, name in enumerate(names)]
    figure.legend(handles=handles, fontsize=8, loc='outside right upper')
    save_figure(figure, path)


def plot_pareto(costs: Sequence[float], scores: Sequence[float], kinds: Sequence[str],
                front: Sequence[bool], cost: str, score: str, path: Union[str, Path]) -> None:
    """Plot the scores of plans against what they cost, with a line through the best ones.

    Args:
        costs (Sequence[float]): What each plan costs.
        scores (Sequence[float]): What each is worth.
        kinds (Sequence[str]): What each is, for the legend and the marks.
        front (Sequence[bool]): Whether no other plan costs as little and is better.
        cost (str): What the costs are, for the axis.
        score (str): What the scores are, for the axis.
        path (str | Path): The PNG file to write.
    """
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    best = sorted((x, y) for x, y, chosen in zip(costs, scores, front) if chosen)
    axes.plot(*zip(*best), color=NO_GROUP_COLOR, linestyle=':', label='front')
    for number, (kind, color) in enumerate(group_colors(kinds).items()):
        chosen = [index for index, other in enumerate(kinds) if other == kind]
        axes.plot([costs[index] for index in chosen], [scores[index] for index in chosen],
                  color=color, marker=_marker(number), markersize=8, alpha=0.8, linestyle='',
                  label=kind)
    axes.set_xlabel(cost)
    axes.set_ylabel(score)
    axes.set_axisbelow(True)
    axes.grid(color=BEFORE_COLOR, linewidth=0.6)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def _mark(axes: Axes, across: Sequence[Optional[float]], up: Sequence[Optional[float]],
          color: Color) -> None:
    """Draw a point for each detector of which both are known, with a mark of its own."""
    for number, (x, y) in enumerate(zip(across, up)):
        if x is not None and y is not None:
            axes.plot(x, y, color=color, marker=_marker(number), markersize=9, alpha=0.8,
                      linestyle='')


def _marker(number: int) -> str:
    return MARKERS[number % len(MARKERS)]


def group_colors(groups: Iterable[str]) -> Dict[str, Color]:
    """Choose a color for each layer group, in the order in which they come; dark grey for ''."""
    groups = list(groups)
    names = [name for name in dict.fromkeys(groups) if name]
    palette = colormaps['tab10' if len(names) <= 10 else 'tab20']
    colors: Dict[str, Color] = {
        name: palette(number % palette.N) for number, name in enumerate(names)}
    return {**colors, '': NO_GROUP_COLOR} if '' in groups else colors


def save_figure(figure: Figure, path: Union[str, Path]) -> None:
    """Write a figure as a picture of 120 dots per inch."""
    FigureCanvasAgg(figure).print_figure(str(path), dpi=120)

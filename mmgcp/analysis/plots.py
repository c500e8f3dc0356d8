# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pictures of what pruning did, as PNG files."""
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Union

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BEFORE_COLOR = '#d8dde3'


def plot_channels(layers: Sequence[str], before: Sequence[int], after: Sequence[int],
                  groups: Sequence[str], path: Union[str, Path]) -> None:
    """Draw the number of channels of each layer before and after pruning.

    Args:
        layers (Sequence[str]): Names of the layers, in the order of the model.
        before (Sequence[int]): Channels of each layer before.
        after (Sequence[int]): Channels of each layer after.
        groups (Sequence[str]): Layer group of each layer, '' for none.
        path (str | Path): The PNG file to write.
    """
    figure = Figure(figsize=(max(8., 0.16 * len(layers)), 5), layout='constrained')
    axes = figure.subplots()
    positions = np.arange(len(layers))
    axes.bar(positions, before, width=0.9, color=BEFORE_COLOR, label='before')
    names = list(dict.fromkeys(groups))
    palette = colormaps['tab10']
    for number, name in enumerate(names):
        chosen = [index for index, group in enumerate(groups) if group == name]
        axes.bar(positions[chosen], np.asarray(after)[chosen], width=0.9,
                 color=palette(number % 10), label=f'after: {name or "not pruned"}')
    axes.set_xticks(positions, layers, rotation=90, fontsize=5)
    axes.set_xlim(-1, len(layers))
    axes.set_ylabel('output channels')
    axes.set_title('Channels kept per layer')
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_score_histograms(scores: Dict[str, Sequence[float]],
                          thresholds: Dict[str, Optional[float]], label: str,
                          path: Union[str, Path]) -> None:
    """Draw a histogram of the scores of each layer group with its threshold.

    Args:
        scores (dict[str, Sequence[float]]): Scores by layer group.
        thresholds (dict[str, float | None]): Threshold by layer group; None for none.
        label (str): What the scores are.
        path (str | Path): The PNG file to write.
    """
    figure = Figure(figsize=(8, 1 + 1.6 * len(scores)), layout='constrained')
    rows: List = list(figure.subplots(len(scores), 1, sharex=True, squeeze=False)[:, 0])
    top = max((max(values) for values in scores.values() if len(values)), default=1.)
    bins = np.linspace(0, top, 80)
    for number, (axes, (name, values)) in enumerate(zip(rows, scores.items())):
        axes.hist(np.asarray(values), bins=bins, color=colormaps['tab10'](number % 10), log=True)
        threshold = thresholds.get(name)
        text = f'{name}: {len(values)} channels'
        if threshold is not None:
            axes.axvline(threshold, color='black', linestyle='--')
            below = np.mean(np.asarray(values) <= threshold) if len(values) else 0
            text += f', {below:.0%} at or below the threshold {threshold:.3g}'
        axes.set_title(text, fontsize=9, loc='left')
        axes.set_ylabel('channels', fontsize=8)
    rows[-1].set_xlabel(label)
    _save(figure, path)


def _save(figure: Figure, path: Union[str, Path]) -> None:
    FigureCanvasAgg(figure).print_figure(str(path), dpi=120)

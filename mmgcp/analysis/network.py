# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A pruned network as a drawing: its layers in the order in which they run, and their widths."""
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .plots import BEFORE_COLOR, NO_GROUP_COLOR, Color, group_colors, save_figure

LAYERS_IN_A_ROW = 36
LEAF = '.conv'  # the end of most names, which says nothing
INCHES = 0.32  # from layer to layer
TITLE = 0.84  # where the names of parts are, in units of the highest bar


class DrawnLayer(NamedTuple):
    """A layer of a network that is drawn.

    Attributes:
        name (str): Its name.
        group (str): Its layer group, '' if it has not been pruned.
        before (int): Number of output channels before.
        after (int): Number of output channels after.
        size (tuple[int], optional): Height and width of its output in pixels, where it has one.
    """
    name: str
    group: str
    before: int
    after: int
    size: Optional[Tuple[int, int]] = None

    @property
    def part(self) -> str:
        """The part of the detector that it belongs to, such as 'backbone'."""
        return self.name.partition('.')[0]

    @property
    def short(self) -> str:
        """Its name inside its part."""
        inside = self.name.partition('.')[2] or self.name
        return inside[:-len(LEAF)] if inside.endswith(LEAF) else inside


Place = Tuple[Optional[DrawnLayer], str]  # a layer, None for a gap, and what is written above it


def parts_of(layers: Sequence[DrawnLayer]) -> List[Tuple[str, List[DrawnLayer]]]:
    """Split a network where another part of the detector begins; parts may come again."""
    parts: List[Tuple[str, List[DrawnLayer]]] = []
    for layer in layers:
        if not parts or parts[-1][0] != layer.part:
            parts.append((layer.part, []))
        parts[-1][1].append(layer)
    return parts


def plot_network(layers: Sequence[DrawnLayer], title: str, path: Union[str, Path],
                 colors: Optional[Dict[str, Color]] = None) -> None:
    """Draw a network: a bar for each layer, as high as the layer is wide.

    What has been removed is light grey at both ends of the bar. Above the bars is the size of the
    feature map where it changes, below them the name of the layer and its channels.

    Args:
        layers (Sequence[DrawnLayer]): The layers, in the order in which they run.
        title (str): The title.
        path (str | Path): The PNG file to write.
        colors (dict[str, Color], optional): Colour by layer group. Defaults to
            :func:`mmgcp.analysis.plots.group_colors`.
    """
    colors = colors or group_colors(layer.group for layer in layers)
    rows = _rows(parts_of(layers))
    longest = max(len(_label(layer)) for layer in layers)
    height = 2.2 + 0.066 * longest  # of a row in inches: bars, and names that stand upright
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(max(7., 0.8 + INCHES * columns), 1.2 + height * len(rows)),
                    layout='constrained')
    widest = max(layer.before for layer in layers)
    last = None  # size that has been written
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows):
        axes.set(xlim=(-0.7, columns - 0.3), ylim=(-0.52, TITLE + 0.14), yticks=[])
        axes.spines[:].set_visible(False)
        last = _draw_row(axes, row, colors, widest, last)
    handles = [Line2D([], [], color=color, linewidth=7, label=name or 'not pruned')
               for name, color in colors.items()]
    handles.append(Line2D([], [], color=BEFORE_COLOR, linewidth=7, label='removed'))
    figure.suptitle(title, fontsize=11)
    figure.legend(handles=handles, fontsize=8, ncols=max(3, columns // 5),
                  loc='outside lower center', frameon=False)
    save_figure(figure, path)


def _rows(parts: Sequence[Tuple[str, List[DrawnLayer]]]) -> List[List[Place]]:
    """Lay a network out in rows of about the same length, with a gap between parts."""
    places: List[Place] = []
    for part, members in parts:
        if places:
            places.append((None, ''))
        places += [(layer, part if number == 0 else '') for number, layer in enumerate(members)]
    number = -(-len(places) // LAYERS_IN_A_ROW)
    edges = np.linspace(0, len(places), number + 1).round().astype(int)
    rows = [places[begin:end] for begin, end in zip(edges, edges[1:])]
    return [_with_heading(row if row[0][0] else row[1:]) for row in rows]


def _with_heading(row: List[Place]) -> List[Place]:
    """Say that a part continues at the beginning of a row, if there is room for it."""
    first, heading = row[0]
    if heading or first is None:
        return row
    room = INCHES * sum(layer is not None and layer.part == first.part for layer, _ in row)
    return [(first, f'{first.part}, continued' if room >= 2 else ''), *row[1:]]


def _label(layer: DrawnLayer) -> str:
    kept = layer.before if layer.before == layer.after else f'{layer.before} → {layer.after}'
    return f'{layer.short}  {kept}'


def _draw_row(axes: Axes, row: Sequence[Place], colors: Dict[str, Color],
              widest: int, last: Optional[Tuple[int, int]]) -> Optional[Tuple[int, int]]:
    """Draw a row; take and return the size of the feature map that was written last."""
    places = [place for place, (layer, _) in enumerate(row) if layer]
    layers = [layer for layer, _ in row if layer]
    for values, faces in (([layer.before for layer in layers], BEFORE_COLOR),
                          ([layer.after for layer in layers],
                           [colors[layer.group] for layer in layers])):
        heights = np.asarray(values) / widest
        axes.bar(places, heights, bottom=-heights / 2, width=0.78, color=faces)
    end, raised = -1., False  # of the heading before
    for place, (layer, heading) in enumerate(row):
        if heading:
            raised = place < end and not raised
            end = place + 0.1 * (len(heading) + 2) / INCHES
            axes.text(place - 0.39, TITLE + 0.12 * raised, heading, fontsize=10, fontweight='bold')
        if layer and layer.size not in (None, last):
            last = layer.size
            axes.text(place, 0.55, '{}×{}'.format(*last), fontsize=6.5, color=NO_GROUP_COLOR,
                      rotation=90, ha='center')
    axes.set_xticks(places, [_label(layer) for layer in layers], rotation=90, fontsize=6.5)
    axes.tick_params(length=0)
    return last

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A plot of what peers are left with, also of what was measured on other machines."""
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Dict, List, NamedTuple, Optional, Sequence

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peers_rows import DENSE, Row
from peers_runs import PeerRuns
from peers_tables import Results

from mmgcp.errors import UserError
from mmgcp.utils.cli import replacing
from mmgcp.utils.json_files import parse_json, read_text

MARKERS = 'os^vD<>pP*Xh'
# Names of rows begin with these; the others are variants of this project
FAMILIES = {'dense': 'Greys', 'slimming': 'YlOrBr', 'tp-': 'Blues', 'mmrazor': 'Greens',
            'criterion-': 'Purples', '': 'Reds'}
# What else has to be alike in all that is in one plot; images and weights have no names that
# are the same on all machines
ALIKE = ('size', 'train_size', 'batch_size', 'calib_batches', 'augment', 'cfg_options', 'of')


class Point(NamedTuple):
    """What a row is left with.

    Attributes:
        row (str): Its name.
        share (float): What was to be removed, 0 without pruning.
        epochs (int): Those that have been trained, in all.
        removed (float): What has been removed, in percent of the MACs.
        accuracy (float): The mean over the seeds.
    """
    row: str
    share: float
    epochs: int
    removed: float
    accuracy: float


class Points:
    """All points that can be plotted.

    Args:
        runs (PeerRuns): The runs.
        rows (Sequence[Row]): Those to plot.
        path (Path, optional): A JSON file with the points measured so far, on any machine. New
            ones are written into it.

    Raises:
        UserError: Those of the file were measured with other settings.
    """

    def __init__(self, runs: PeerRuns, rows: Sequence[Row], path: Optional[Path] = None):
        results = Results(runs, rows)
        self.rows, self.metric = rows, results.dense['metric']
        settings = dict(config=Path(runs.settings['config']).stem, metric=self.metric,
                        prune_options=repr(runs.args.prune_options), lr=runs.lr,
                        **{name: runs.settings[name] for name in ALIKE if name in runs.settings})
        found = _read(path, settings) if path and path.exists() else []
        self.points: Dict[tuple, Point] = {point[:3]: point for point in [
            *found, *(point for row in [DENSE, *rows] for point in _measured(results, row))]}
        if path:
            with replacing(path) as (file, ):
                file.write_text(_as_json(settings, sorted(self.points.values())))

    def of(self, row: Row, epochs: int) -> List[Point]:
        """The points of a row, by what has been removed."""
        return sorted((point for point in self.points.values()
                       if point.row == row.name and point.epochs == epochs),
                      key=lambda point: point.removed)


def _measured(results: Results, row: Row) -> List[Point]:
    """What has been measured of a row in this folder."""
    points = []
    for share in [0.] if row == DENSE else results.shares:
        macs = [item['macs'] for item in results.of('pruned', row, share)]
        for epochs, accuracies in results.accuracies(row, share).items():
            removed = 100 * (1 - mean(macs) / results.dense['macs'])
            points.append(Point(row.name, share, epochs, round(removed, 1),
                                round(mean(accuracies), 4)))
    return points


def _read(path: Path, settings: dict) -> List[Point]:
    """Read the points of a file, which have to have been measured with these settings."""
    found = parse_json(read_text(path, 'the points'), f'the points {path}')
    for name in sorted({*found['settings'], *settings}):
        theirs, ours = (values.get(name) for values in (found['settings'], settings))
        if theirs != ours:
            raise UserError(f'{path} has points with {name}={theirs!r}, but these runs are with '
                            f'{name}={ours!r}')
    return [Point(*point) for point in found['points']]


def _as_json(settings: dict, points: Sequence[Point]) -> str:
    """A point a line."""
    lines = ',\n'.join(f'    {json.dumps(point)}' for point in points)
    return (f'{{\n  "settings": {json.dumps(settings)},\n'
            f'  "fields": {json.dumps(Point._fields)},\n  "points": [\n{lines}\n  ]\n}}\n')


def plot(points: Points, epochs: int, path: Path) -> None:
    """Plot accuracy against MACs: right away, and after a training, if there has been one.

    Args:
        points (Points): What to plot.
        epochs (int): Length of the training.
        path (Path): A PNG file.
    """
    shown = [0, *([epochs] if any(points.of(row, epochs) for row in points.rows) else [])]
    figure = Figure(figsize=(1 + 5 * len(shown), 5.5), layout='constrained')
    styles = _styles(points.rows)
    for axes, epoch in zip(figure.subplots(1, len(shown), squeeze=False, sharey=True)[0], shown):
        for row in points.rows:
            found = [] if row == DENSE else points.of(row, epoch)
            if found:
                color, marker = styles[row.name]
                axes.plot([point.removed for point in found], [point.accuracy for point in found],
                          color=color, marker=marker, markersize=5, linewidth=1.2,
                          linestyle=':' if row.options.get('recalibrate') else '-',
                          label=row.title)
        for point in points.of(DENSE, epoch):
            axes.axhline(point.accuracy, color='black', linestyle='--', linewidth=1,
                         label=DENSE.title)
        axes.set_xlabel('MACs removed (%)')
        axes.set_ylabel(points.metric)
        axes.set_title(f'after {epoch} epochs' if epoch else 'right after pruning')
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.grid(color='#d8dde3', linewidth=0.6)
    handles = {label: handle for axes in figure.axes
               for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, fontsize=8, ncols=2, loc='outside lower center')
    FigureCanvasAgg(figure).print_figure(str(path), dpi=130)


def _styles(rows: Sequence[Row]) -> Dict[str, tuple]:
    """A color and a marker for each row: rows of a family have shades of one color."""
    members = defaultdict(list)
    for row in rows:
        members[next(prefix for prefix in FAMILIES if row.name.startswith(prefix))].append(row.name)
    return {name: (colormaps[FAMILIES[family]](0.45 + 0.5 * number / len(names)),
                   MARKERS[number % len(MARKERS)])
            for family, names in members.items() for number, name in enumerate(names)}

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The drawing of a pruned detector, from the folder that tools/prune.py has written."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mmgcp.analysis.network import DrawnLayer, plot_network
from mmgcp.analysis.network_html import write_network_html
from mmgcp.analysis.plots import group_colors
from mmgcp.errors import UserError
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES
from mmgcp.pruning.prunable import shape_or_leave_head_out
from mmgcp.utils.cli import replacing
from mmgcp.utils.config import build_detector, image_size, load_config
from mmgcp.utils.json_files import parse_json, read_text, shorten

FILES = ('network.png', 'network.html')
Size = Optional[Tuple[int, int]]


def draw_network(pruned: Path, folder: Optional[Path] = None) -> List[Path]:
    """Draw a pruned detector as ``network.png`` and ``network.html``.

    Args:
        pruned (Path): A folder with the ``pruned.py`` and ``report.json`` of tools/prune.py.
        folder (Path, optional): An existing folder for the drawings. Defaults to the same.

    Returns:
        list[Path]: The two files.

    Raises:
        UserError: The folder lacks one of the files, or they do not fit together.
    """
    report = read_report(pruned / 'report.json')
    layers = in_running_order(report['layers'], _sizes(pruned / 'pruned.py'))
    colors = group_colors(row['group'] for row in report['layers'])  # those of channels.png
    title = _title(report)
    files = [(folder or pruned) / name for name in FILES]
    with replacing(*files) as (picture, page):
        plot_network(layers, title, picture, colors)
        write_network_html(layers, title, page, colors)
    return files


def read_report(path: Path) -> Dict[str, Any]:
    """Read a ``report.json``.

    Args:
        path (Path): The file.

    Returns:
        dict: What :attr:`mmgcp.pruning.PruningResult.report` has.

    Raises:
        UserError: There is none, or it has no channels of layers.
    """
    report = parse_json(read_text(path, 'the report'), f'the report {path}')
    rows = report.get('layers') if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path} is no report of tools/prune.py: it has no layers')
    for row in rows:
        if not (isinstance(row, dict) and isinstance(row.get('layer'), str)
                and isinstance(row.get('group'), str)
                and all(type(row.get(name)) is int for name in ('before', 'after'))
                and 0 <= row['after'] <= row['before'] > 0):
            raise UserError(f'the report {path} needs layer, group, before and after of each '
                            f'layer, but one is {shorten(row)}')
    return report


def in_running_order(rows: List[dict], sizes: Dict[str, Size]) -> List[DrawnLayer]:
    """Bring the layers of a report into the order in which they run.

    Args:
        rows (list[dict]): The layers of a report.
        sizes (dict[str, tuple[int] | None]): Height and width of the output of each layer that
            runs, in this order.

    Returns:
        list[DrawnLayer]: Those that run; each of the others follows the one before it in the
        report.
    """
    place = {name: number for number, name in enumerate(sizes)}
    keys, last = [], -1
    for row in rows:
        last = place.get(row['layer'], last)
        keys.append(last)
    ordered = sorted(range(len(rows)), key=lambda number: keys[number])  # stable
    return [DrawnLayer(rows[number]['layer'], rows[number]['group'], rows[number]['before'],
                       rows[number]['after'], sizes.get(rows[number]['layer']))
            for number in ordered]


def _sizes(config: Path) -> Dict[str, Size]:
    """Run the detector of a config, and record the sizes of what its layers emit first."""
    if not config.is_file():
        raise UserError(f'there is no {config}: give the folder that tools/prune.py has written')
    cfg = load_config(str(config))
    model = build_detector(cfg).eval()
    width, height = image_size(cfg)
    channels = shape_or_leave_head_out(model, (3, height, width))[0]
    names = [name for name, module in model.named_modules() if isinstance(module, WEIGHT_TYPES)]
    sizes: Dict[str, Size] = {}
    for name, _, shape in record_shapes(model, names, (channels, height, width)):
        sizes.setdefault(name, (shape[2], shape[3]) if len(shape) == 4 else None)
    return sizes


def _title(report: Dict[str, Any]) -> str:
    """Say what is left of parameters and MACs, if the report has them."""
    texts = []
    for name, label, unit, factor in (('params', 'parameters', 'M', 1e6),
                                      ('macs', 'MACs', 'G', 1e9)):
        figures = report.get(name)
        if isinstance(figures, dict) and all(
                type(figures.get(key)) in (int, float) and figures[key] > 0
                for key in ('before', 'after')):
            before, after = figures['before'], figures['after']
            texts.append(f'{label} {before / factor:.3g} → {after / factor:.3g} {unit} '
                         f'({after / before - 1:+.1%})')
    return ', '.join(['Kept channels', *texts])

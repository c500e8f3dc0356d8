# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Plans of different widths and depths as a table, as JSON and as a picture."""
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List

from mmgcp.analysis.plots import plot_pareto
from mmgcp.utils.cli import replacing

from .comparison_report import markdown_table
from .pareto import Pareto, cost_of
from .pareto_options import ParetoOptions

FILES = ('pareto.md', 'pareto.json', 'pareto.png')


def format_pareto(found: Pareto, options: ParetoOptions) -> str:
    """Return plans as a table in Markdown, the most costly first, with a legend.

    Args:
        found (Pareto): What was found.
        options (ParetoOptions): How.

    Returns:
        str: The lines.
    """
    rows, first = sorted(found.rows, key=cost_of, reverse=True), found.rows[0]
    columns = {
        'model': [row['model'] for row in rows],
        'blocks removed': [str(len(row['blocks'])) for row in rows],
        'MACs': [f'{row["macs"] / 1e9:.3f} G' for row in rows],
        'of them': [f'{row["macs"] / first["macs"]:.1%}' for row in rows],
        'parameters': [f'{row["parameters"] / 1e6:.3f} M' for row in rows]}
    if len({tuple(row['image_size']) for row in rows}) > 1:
        columns['images'] = [_pixels(row) for row in rows]
    if 'latency_ms' in first:
        columns['ms'] = [f'{row["latency_ms"]:.2f}' for row in rows]
    columns[_score_name(found)] = [f'{row["score"]:.3f}' for row in rows]
    columns['front'] = ['yes' if row['front'] else '' for row in rows]
    columns['CPU s'] = [f'{row["cpu_seconds"]:.0f}' for row in rows]
    lines = markdown_table(list(columns), list(zip(*columns.values())))
    return '\n'.join([*lines, '', *_legend(found, options), *found.notes])


def _pixels(row: Dict[str, Any]) -> str:
    return '×'.join(map(str, row['image_size']))


def _kind(row: Dict[str, Any], first: Dict[str, Any]) -> str:
    """Say in the legend of the picture what is common to several models."""
    number = len(row['blocks'])
    kind = ('original' if row['model'] == first['model'] else
            f'{number} block{"s" * (number != 1)} removed')
    return kind if row['image_size'] == first['image_size'] else f'{kind}, {_pixels(row)}'


def _score_name(found: Pareto) -> str:
    return found.rows[0].get('metric', 'loss').split('/')[-1]


def _legend(found: Pareto, options: ParetoOptions) -> List[str]:
    """Say what was measured on what, and which blocks go in which order."""
    first = found.rows[0]
    on = f'{options.calib_batches} batches of training images'
    if 'metric' in first:
        lines = [f'Scored right after compensation: {first["metric"]} on the first '
                 f'{first["val_images"]} validation images, without any training; {on} to score '
                 'and compensate with.']
    else:
        lines = [f'Scored right after compensation: the loss on {on}, with which channels are '
                 'scored and compensated, too.']
    if options.runtime is not None:
        lines[0] += f' ms: of an image in {options.runtime}, on one thread.'
    order = max((row['blocks'] for row in found.rows), key=len)
    if order:
        lines.append(f'Blocks are removed in this order: {", ".join(order)}.')
    return lines


def write_pareto(found: Pareto, options: ParetoOptions, folder: Path) -> None:
    """Write ``pareto.md``, ``pareto.json`` and ``pareto.png``: all of them, or none.

    Args:
        found (Pareto): What was found.
        options (ParetoOptions): How.
        folder (Path): The folder, which exists.
    """
    with replacing(*(folder / name for name in FILES)) as (table, data, picture):
        table.write_text(f'{format_pareto(found, options)}\n\n![plans]({FILES[2]})\n')
        data.write_text(json.dumps(dict(options=asdict(options), models=found.rows,
                                        notes=found.notes), indent=2) + '\n')
        timed = 'latency_ms' in found.rows[0]
        plot_pareto([cost_of(row) / (1 if timed else 1e9) for row in found.rows],
                    [row['score'] for row in found.rows],
                    [_kind(row, found.rows[0]) for row in found.rows],
                    [row['front'] for row in found.rows],
                    'ms for an image' if timed else 'GMACs', _score_name(found), picture)

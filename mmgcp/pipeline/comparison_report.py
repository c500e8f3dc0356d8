# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A comparison of detectors as a table, as JSON and as a picture."""
import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

from mmgcp.analysis.plots import plot_comparison
from mmgcp.utils.cli import replacing

from .compare_options import CompareOptions
from .comparison import INT8, ONNX, TORCH, Comparison

FILES = ('comparison.md', 'comparison.json', 'comparison.png')
MIB = 2**20
NONE = '–'
SHARE = 'promise'


def format_comparison(found: Comparison, options: CompareOptions) -> str:
    """Return a comparison as a table in Markdown, with a legend and what could not be measured.

    Args:
        found (Comparison): The comparison.
        options (CompareOptions): How it was made.

    Returns:
        str: The lines.
    """
    rows = found.rows
    columns = [[row['name'] for row in rows]]
    titles = ['detector']
    for title, cells in _columns(found):
        if any(cell != NONE for cell in cells):
            titles.append(title)
            columns.append(cells)
    lines = [*markdown_table(titles, list(zip(*columns))), '', *_legend(found, options)]
    return '\n'.join([*lines, *found.notes])


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    """Return the lines of a table whose columns are aligned, the first one to the left."""
    widths = [max(len(row[place]) for row in (titles, *rows)) for place in range(len(titles))]
    rule = [f':{"-" * (width - 1)}' if place == 0 else f'{"-" * (width - 1)}:'
            for place, width in enumerate(widths)]
    lines = []
    for row in (titles, rule, *rows):
        cells = [cell.ljust(width) if place == 0 else cell.rjust(width)
                 for place, (cell, width) in enumerate(zip(row, widths))]
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def _columns(found: Comparison):
    """Yield the title and the cells of each column; those without contents are left out."""
    rows, first = found.rows, found.rows[0]
    metrics = {row['metric'] for row in rows if 'metric' in row}
    accuracy = min(metrics).split('/')[-1] if len(metrics) == 1 else 'accuracy'
    yield accuracy, [_number(row.get('accuracy', {}).get(TORCH), '.3f') for row in rows]
    for title, key, scale, unit in (('parameters', 'parameters', 1e6, 'M'),
                                    ('MACs', 'macs', 1e9, 'G')):
        yield title, [f'{row[key] / scale:.3f} {unit} {_change(row[key], first[key])}'.rstrip()
                      for row in rows]
    yield 'checkpoint', [_mebibytes(row['checkpoint_bytes']) for row in rows]
    yield 'memory', [_mebibytes(row['peak_memory_bytes']) for row in rows]
    for kind in (TORCH, ONNX, INT8):
        if kind == INT8:
            yield f'{INT8}: {accuracy}', [
                _number(row.get('accuracy', {}).get(INT8), '.3f') for row in rows]
        if kind != TORCH:
            yield f'{kind}: file', [_mebibytes(row['file_bytes'].get(kind)) for row in rows]
        yield f'{kind}: ms', [_number(row.get('latency_ms', {}).get(kind), '.2f') for row in rows]
        yield SHARE, [NONE if row is first else
                      _number(row.get('promise_kept', {}).get(kind), '.0%') for row in rows]


def _number(value: Any, shown: str) -> str:
    return NONE if value is None else format(value, shown)


def _mebibytes(value: Any) -> str:
    return NONE if value is None else f'{value / MIB:.2f} MiB'


def _change(value: float, first: float) -> str:
    return '' if value == first else f'{value / first - 1:+.1%}'


def _legend(found: Comparison, options: CompareOptions) -> List[str]:
    sizes = sorted({'{} x {}'.format(*row['input_size']) for row in found.rows})
    threads = 'one thread' if options.threads == 1 else f'{options.threads} threads'
    rounds = 'one round' if options.rounds == 1 else f'{options.rounds} rounds'
    lines = [f'Images of {" and ".join(sizes)} pixels, one at a time. ms: medians of '
             f'{rounds}, on {threads}, without decoding and NMS. memory: at most, in PyTorch, '
             'weights included.']
    if len(found.rows) > 1:
        lines.append(f'{SHARE}: how much of the speed-up that the MACs promise against '
                     f'{found.rows[0]["name"]} arrives.')
    measured = [row for row in found.rows if 'metric' in row]
    if measured:
        names = ' and '.join(sorted({row['metric'] for row in measured}))
        numbers = ' and '.join(sorted({str(row['val_images']) for row in measured}))
        lines.append(f'Accuracy: {names} on the first {numbers} validation images.')
    return [' '.join(lines)]


def write_comparison(found: Comparison, options: CompareOptions, folder: Path) -> None:
    """Write ``comparison.md``, ``comparison.json`` and ``comparison.png``: all of them, or none.

    Args:
        found (Comparison): The comparison.
        options (CompareOptions): How it was made.
        folder (Path): The folder, which exists.
    """
    settings: Dict[str, Any] = dict(threads=options.threads, rounds=options.rounds)
    with replacing(*(folder / name for name in FILES)) as (table, data, picture):
        table.write_text(f'{format_comparison(found, options)}\n\n![comparison]({FILES[2]})\n')
        data.write_text(json.dumps(dict(settings, detectors=found.rows, notes=found.notes),
                                   indent=2) + '\n')
        rows = found.rows
        plot_comparison(
            [row['name'] for row in rows], [row['macs'] for row in rows],
            {kind: [row.get('latency_ms', {}).get(kind) for row in rows]
             for kind in (TORCH, ONNX, INT8)},
            {kind: [row.get('accuracy', {}).get(TORCH if kind == ONNX else kind) for row in rows]
             for kind in (TORCH, ONNX, INT8)}, picture)

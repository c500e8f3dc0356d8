# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Accuracy, size and speed of the stages, side by side."""
import json
from pathlib import Path
from typing import Dict, List, Sequence

from mmgcp.errors import UserError
from mmgcp.utils.cli import replacing

from .compare_options import CompareOptions
from .comparison import TORCH, compare, load_entries

# A detector with a lower mAP50 has learnt too little to say what compression takes from it
LEAST_MAP50 = 0.2
# Names in the summary, and those of VOC's and COCO's metrics
METRICS = dict(mAP50=('AP50', 'bbox_mAP_50'), mAP=('mAP', 'bbox_mAP'))


def choose_metrics(metrics: Dict[str, float]) -> Dict[str, float]:
    """Choose mAP50 and mAP from the metrics of a test.

    Args:
        metrics (dict[str, float]): Metrics by name, such as ``'pascal_voc/AP50'``.

    Returns:
        dict[str, float]: ``mAP50`` and ``mAP``.

    Raises:
        UserError: One of them is missing.
    """
    by_name = {key.split('/')[-1]: value for key, value in metrics.items()}
    chosen = {}
    for name, aliases in METRICS.items():
        found = [by_name[alias] for alias in aliases if alias in by_name]
        if not found:
            raise UserError(f'the test reports no {aliases[0]}, but {sorted(metrics)}')
        chosen[name] = found[0]
    return chosen


def measure_stages(configs: Sequence[Path], checkpoints: Sequence[str]) -> List[dict]:
    """Measure the size and speed of detectors for one image; see :func:`compare`.

    MACs and latency are those of backbone and neck where the head does not run on an image alone.

    Args:
        configs (Sequence[Path]): The configs of the stages.
        checkpoints (Sequence[str]): Their checkpoints.

    Returns:
        list[dict]: ``parameters``, ``macs`` and ``latency_ms`` of each.
    """
    entries = load_entries([str(config) for config in configs], checkpoints)
    found = compare(entries, CompareOptions(val_images=0), exported=False)
    return [dict(parameters=row['parameters'], macs=row['macs'],
                 latency_ms=round(row['latency_ms'][TORCH], 2)) for row in found.rows]


def format_table(rows: List[dict]) -> str:
    """Return the stages as a table in Markdown, with the changes from the first one."""
    first = rows[0]
    lines = ['| stage     | mAP50 |   mAP | parameters       | MACs             | latency  |',
             '|:----------|------:|------:|-----------------:|-----------------:|---------:|']
    for row in rows:
        sizes = [f'{row[name] / scale:.3f} {unit} {row[name] / first[name] - 1:+6.1%}'
                 for name, scale, unit in (('parameters', 1e6, 'M'), ('macs', 1e9, 'G'))]
        lines.append(f'| {row["stage"]:<9} | {row["mAP50"]:.3f} | {row["mAP"]:.3f} '
                     f'| {sizes[0]:>16} | {sizes[1]:>16} | {row["latency_ms"]:>5.1f} ms |')
    return '\n'.join(lines)


def too_weak(row: dict) -> str:
    """Say that the first stage has learnt too little to compare with, and what to do; or ''."""
    if row['mAP50'] >= LEAST_MAP50:
        return ''
    return (f'The {row["stage"]} finds too little to compare with: mAP50 {row["mAP50"]:.3f}, '
            f'below {LEAST_MAP50}. Begin from weights that were trained on a large data set '
            '(--cfg-options load_from=CHECKPOINT, of other classes, too), or train for longer '
            '(--epochs).')


def format_summary(rows: List[dict]) -> str:
    """Return the table of the stages, and below it what is wrong with it."""
    return '\n\n'.join(filter(None, (format_table(rows), too_weak(rows[0]))))


def write_summary(rows: List[dict], folder: Path) -> None:
    """Write the stages as ``summary.json`` and ``summary.md``."""
    with replacing(folder / 'summary.json', folder / 'summary.md') as paths:
        paths[0].write_text(json.dumps(dict(stages=rows), indent=2) + '\n')
        paths[1].write_text(format_summary(rows) + '\n\n![detections](detections.png)\n\n'
                            '![curves](curves.png)\n')

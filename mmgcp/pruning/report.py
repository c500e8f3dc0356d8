# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What was pruned, for people and for programs."""
import json
from pathlib import Path
from typing import Dict, List, NamedTuple

from mmgcp.analysis.plots import plot_channels, plot_score_histograms

from .api import PruningResult


class LayerRow(NamedTuple):
    """Output channels of a layer before and after pruning."""
    layer: str
    group: str
    before: int
    after: int


def layer_rows(result: PruningResult) -> List[LayerRow]:
    """List the convolutions and linear layers in the order of the model."""
    groups = {layer: ' + '.join(item.groups) for item in result.plan.sets for layer in item.layers}
    return [
        LayerRow(name, groups.get(name, ''), counts[-1], result.channels_after[name][-1])
        for name, counts in result.channels_before.items() if len(counts) == 2
    ]


def summarize(result: PruningResult) -> str:
    """Return a table of the layer groups and the totals, for a terminal."""
    lines = [f'{"layer group":<24}{"threshold":>10}{"channels":>18}{"kept":>8}']
    for name, rows in _rows_by_group(layer_rows(result)).items():
        before, after = sum(row.before for row in rows), sum(row.after for row in rows)
        threshold = result.plan.thresholds.get(name)
        shown = '-' if threshold is None else f'{threshold:.4g}'
        lines.append(f'{name or "(not pruned)":<24}{shown:>10}{before:>8} -> {after:>6}'
                     f'{after / before:>8.1%}')
    for label, (before, after), unit, factor in (('parameters', result.params, 'M', 1e6),
                                                 ('operations', result.macs, 'GMACs', 1e9)):
        lines.append(f'{label:<24}{before / factor:>10.3f} -> {after / factor:.3f} {unit} '
                     f'({after / before - 1:+.1%})')
    return '\n'.join(lines)


def write_report(result: PruningResult, folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and its pictures.

    Args:
        result (PruningResult): What pruning led to.
        folder (Path): Existing folder to write into.
    """
    rows = layer_rows(result)
    plot_channels([row.layer for row in rows], [row.before for row in rows],
                  [row.after for row in rows], [row.group for row in rows],
                  folder / 'channels.png')
    criterion = result.plan.options['criterion']['type'].split('.')[-1]
    plot_score_histograms({name: values.tolist() for name, values in result.scores.items()},
                          result.plan.thresholds, f'score ({criterion})', folder / 'scores.png')
    report = dict(
        params=dict(before=result.params[0], after=result.params[1]),
        macs=dict(before=result.macs[0], after=result.macs[1]),
        thresholds=result.plan.thresholds,
        options=result.plan.options,
        layers=[row._asdict() for row in rows],
        skipped=result.plan.skipped,
        uncompensated=result.uncompensated)
    (folder / 'report.json').write_text(json.dumps(report, indent=2) + '\n')
    (folder / 'report.md').write_text(_markdown(result, rows, criterion))


def _rows_by_group(rows: List[LayerRow]) -> Dict[str, List[LayerRow]]:
    grouped: Dict[str, List[LayerRow]] = {}
    for row in rows:
        grouped.setdefault(row.group, []).append(row)
    return grouped


def _markdown(result: PruningResult, rows: List[LayerRow], criterion: str) -> str:
    lines = [
        '# Pruning report', '', '```', summarize(result), '```', '',
        '## Channels kept per layer', '', '![channels](channels.png)', '',
        f'## Scores ({criterion}) and thresholds per layer group', '', '![scores](scores.png)', '',
        '## Layers', '', '| layer | group | before | after | kept |', '|---|---|--:|--:|--:|'
    ]
    lines += [f'| {row.layer} | {row.group} | {row.before} | {row.after} | '
              f'{row.after / row.before:.0%} |' for row in rows]
    for title, items in (('Left alone', [f'{name}: {reason}'
                                         for name, reason in result.plan.skipped.items()]),
                         ('Could not absorb all constants of removed channels',
                          result.uncompensated)):
        if items:
            lines += ['', f'## {title}', '', *(f'- {item}' for item in items)]
    return '\n'.join(lines) + '\n'

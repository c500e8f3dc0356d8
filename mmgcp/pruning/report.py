# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What was pruned, for people and for programs."""
import json
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Callable, Dict, List

from mmgcp.analysis.plots import plot_channels, plot_score_histograms
from mmgcp.utils.config_content import type_name

from .findings import accuracy_line, blocks_lines, warnings_about
from .graph import PREDICTIONS
from .options import BLOCK
from .result import LayerRow, PruningResult
from .rounding import off_multiples


def summarize(result: PruningResult) -> str:
    """Return a table of the layer groups and the totals, for a terminal."""
    lines = [f'{"layer group":<24}{"threshold":>10}{"channels":>18}{"kept":>8}']
    grouped: Dict[str, List[LayerRow]] = defaultdict(list)
    for row in result.layers:
        grouped[row.group].append(row)
    for name, rows in sorted(grouped.items(), key=lambda item: not item[0]):
        before, after = sum(row.before for row in rows), sum(row.after for row in rows)
        threshold = result.plan.thresholds.get(name)
        shown = '-' if threshold is None else f'{threshold:.4g}'
        lines.append(f'{name or "(not pruned)":<24}{shown:>10}{before:>8} -> {after:>6}'
                     f'{after / before:>8.1%}')
    totals = ('parameters', result.params, 'M', 1e6), ('MACs', result.macs, 'GMACs', 1e9)
    for label, (before, after), unit, factor in totals:
        lines.append(f'{label:<24}{before / factor:>10.3f} -> {after / factor:.3f} {unit} '
                     f'({after / before - 1:+.1%})')
    criterion = _criterion(result.plan.options)
    if criterion:
        allocation = result.plan.options.get('allocation')
        lines.append(f'{"channels chosen by":<24}{criterion}'
                     + (f', {allocation}' if allocation else '') + _tried(result.plan.options))
    if result.latency:
        lines.append(_latency(result.latency))
    lines += blocks_lines(result)
    lines += accuracy_line(result)
    alone = Counter(reason for reason in result.plan.skipped.values() if reason != PREDICTIONS)
    lines += [f'{number} layers left alone: {reason}' for reason, number in alone.most_common(3)]
    if len(alone) > 3:
        lines.append(f'layers left alone for {len(alone) - 3} other reasons are in the report')
    if result.uncompensated:
        lines.append(f'{len(result.uncompensated)} layers could not absorb all that removed '
                     'channels emitted')
    if result.fits:
        kinds = ', '.join(f'{number} {kind}' for kind, number in Counter(
            result.fits.values()).most_common())
        lines.append(f'{len(result.fits)} layers fitted to their original outputs ({kinds})')
    if result.recovery:
        lines.append('recovery: ' + ', '.join(
            f'{name.replace("_", " ")} {value:.4g}' if isinstance(value, float) else
            f'{name.replace("_", " ")} {value}' for name, value in result.recovery.items()))
    lines += warnings_about(result)
    return '\n'.join(lines)


def _criterion(options: Dict[str, Any]) -> str:
    """Return the name of the criterion of a plan's options, '' if they, as edited, have none."""
    criterion = options.get('criterion')
    name = criterion.get('type') if isinstance(criterion, dict) else None
    return type_name(name) if isinstance(name, str) else ''


def _tried(options: Dict[str, Any]) -> str:
    """Return the losses that several criteria led to, if more than one was tried."""
    tried = options.get('tried')
    tried = tried if isinstance(tried, list) else []
    losses = [f'{_criterion(item)} {item["loss"]:.3f}' for item in tried
              if isinstance(item, dict) and isinstance(item.get('loss'), float)]
    return f' (loss without training: {", ".join(losses)})' if len(losses) > 1 else ''


def _latency(latency: Dict[str, Any]) -> str:
    """Return a line of the table about what an image takes."""
    after, target = latency['after'], latency['target']
    found = 'not measured' if after is None else f'{after:.2f} ms ({after / target - 1:+.1%})'
    missed = '' if latency['met'] or after is None else ', which is the nearest that was found'
    return (f'{latency["runtime"]:<24}{latency["before"]:>10.2f} -> {found} for {target:g} ms'
            f'{missed}')


def write_report(result: PruningResult, folder: Path) -> None:
    """Write ``report.json``, ``report.md`` and its pictures into a folder, which exists."""
    rows = result.layers
    _draw(plot_channels, [row.layer for row in rows], [row.before for row in rows],
          [row.after for row in rows], [row.group for row in rows], folder / 'channels.png')
    if result.scores:
        _draw(plot_score_histograms,
              {name: values.tolist() for name, values in result.scores.items()},
              result.plan.thresholds, f'score ({_criterion(result.plan.options)})',
              folder / 'scores.png')
    (folder / 'report.json').write_text(json.dumps(result.report, indent=2) + '\n')
    (folder / 'report.md').write_text(_markdown(result, rows))


def _draw(plot: Callable, *arguments: Any) -> None:
    """Draw a picture, without which the results are still written."""
    try:
        plot(*arguments)
    except OSError:  # nothing else could be written, either
        raise
    except Exception as error:
        warnings.warn(f'{arguments[-1].name} has not been drawn: {type(error).__name__}: {error}',
                      stacklevel=3)


def _markdown(result: PruningResult, rows: List[LayerRow]) -> str:
    lines = [
        '# Pruning report', '', '```', summarize(result), '```', '',
        '## Channels kept per layer', '', '![channels](channels.png)', ''
    ]
    if result.scores:
        lines += ['## Scores and thresholds per layer group', '', '![scores](scores.png)', '']
    fitted = bool(result.fits)
    lines += ['## Layers', '', '| layer | group | before | after | kept |' + ' fitted |' * fitted,
              '|---|---|--:|--:|--:|' + '---|' * fitted]
    lines += [f'| {row.layer} | {row.group} | {row.before} | {row.after} | '
              f'{row.after / row.before:.0%} |' + f' {result.fits.get(row.layer, "")} |' * fitted
              for row in rows]
    multiple = result.plan.options.get('round_to')  # of a plan that anyone may have edited
    multiple = multiple if type(multiple) is int and multiple > 1 else BLOCK
    for title, items in ((f'No multiple of {multiple} channels, which can be slow',
                          [f'{row.layer}: {row.after}'
                           for row in off_multiples(rows, multiple)]),
                         ('Removed blocks', result.plan.removed_blocks),
                         ('Blocks that cannot be removed',
                          [f'{name}: {reason}'
                           for name, reason in result.plan.skipped_blocks.items()
                           if result.plan.removed_blocks or result.depths]),
                         ('Left alone', [f'{name}: {reason}'
                                         for name, reason in result.plan.skipped.items()]),
                         ('Could not absorb all that removed channels emitted',
                          result.uncompensated)):
        if items:
            lines += ['', f'## {title}', '', *(f'- {item}' for item in items)]
    return '\n'.join(lines) + '\n'

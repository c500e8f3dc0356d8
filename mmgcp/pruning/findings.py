# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What pruning has done to the accuracy, and what it has torn down."""
from collections import defaultdict
from typing import Dict, List

from .result import LayerRow, PruningResult

LITTLE = 0.25  # of the accuracy, or of the channels of a layer group


def accuracy_line(result: PruningResult) -> List[str]:
    """Say in a line what the accuracy was and is, or why nobody knows; no line if nobody asked."""
    found = result.accuracy
    if 'not_measured' in found:
        return [f'accuracy not measured: {found["not_measured"]}']
    if 'after' not in found:
        return []
    before, after = found['before'], found['after']
    change = f' ({after / before - 1:+.1%})' if before >= 0.0005 else ''  # 0.000 otherwise
    return [f'{"accuracy":<24}{before:>10.3f} -> {after:.3f} {found["metric"]} on '
            f'{found["images"]} validation images{change}']


def blocks_lines(result: PruningResult) -> List[str]:
    """Say in a line or two which blocks are removed, and what numbers of them led to."""
    names = result.plan.removed_blocks
    plural = 's' * (len(names) > 1)
    lines = [f'{len(names)} block{plural} removed: {", ".join(names)}'] if names else []
    if result.depths:
        lines.append('loss by the number of removed blocks: ' + ', '.join(
            f'{item["blocks"]}: {item["loss"]:.4g}' for item in result.depths))
    return lines


def warnings_about(result: PruningResult) -> List[str]:
    """Name layer groups of which little is left; say if little of the accuracy is, and what helps.

    That is less than a quarter.
    """
    lines = []
    groups = poor_groups(result)
    if groups:
        lines.append('warning: less than a quarter of the channels is left in '
                     + ', '.join(f'{name} ({after} of {before})'
                                 for name, (before, after) in groups.items()))
    found = result.accuracy
    if 'after' in found and found['after'] < LITTLE * found['before']:
        share = f'only {found["after"] / found["before"]:.0%}' if found['after'] else 'nothing'
        lines.append(f'warning: {share} of the accuracy is left (compensation: '
                     f'{result.compensation or "none"}); {_next_step(result)}')
    return lines


def poor_groups(result: PruningResult) -> Dict[str, List[int]]:
    """The channels before and after of the layer groups that keep less than a quarter of them."""
    rows: Dict[str, List[LayerRow]] = defaultdict(list)
    for row in result.layers:
        if row.group:
            rows[row.group].append(row)
    totals = {name: [sum(row.before for row in found), sum(row.after for row in found)]
              for name, found in rows.items()}
    return {name: [before, after] for name, (before, after) in totals.items()
            if after < LITTLE * before}


def _next_step(result: PruningResult) -> str:
    """Say what leads to a detector that can be used."""
    steps = ['remove less']
    if result.compensation != 'reconstruct':
        steps.append('compensate by reconstruct, which needs training images')
    steps.append('let it recover for longer than before (--recover-minutes)' if result.recovery
                 else 'let it recover with --recover-minutes')
    return f'{", ".join(steps)}, or fine-tune pruned.py with tools/train.py'

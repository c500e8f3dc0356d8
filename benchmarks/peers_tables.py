# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Tables in Markdown of what peers are left with."""
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Dict, List, Optional, Sequence

import torch
from peers_rows import DENSE, Row, epochs_before
from peers_runs import PeerRuns
from prune_speed import _markdown, describe_machine

from mmgcp.errors import UserError


class Results:
    """What has been measured with the present settings.

    Args:
        runs (PeerRuns): The runs.
        rows (Sequence[Row]): Those to show.

    Raises:
        UserError: Nothing has been measured with them.
    """

    def __init__(self, runs: PeerRuns, rows: Sequence[Row]):
        self.rows, self.epochs = rows, runs.args.epochs
        self.found = {kind: [item for item in runs.results(kind)
                             if item['inputs']['settings'] == runs.settings]
                      for kind in ('pruned', 'trained', 'failed')}
        self.found['trained'] = [item for item in self.found['trained']
                                 if runs.rates.items() <= item['inputs'].items()]
        dense = self.of('pruned', DENSE, 0.)
        if not dense:
            raise UserError(f'nothing in {runs.folder} was measured with these settings')
        self.dense = dense[0]

    @property
    def shares(self) -> List[float]:
        """All shares that have been removed."""
        return sorted({item['inputs']['share'] for items in self.found.values() for item in items
                       if item['inputs']['share']})

    def of(self, kind: str, row: Row, share: float) -> List[dict]:
        """The results of a row, by seed."""
        return sorted((item for item in self.found[kind] if item['inputs']['row'] == row.record
                       and item['inputs']['share'] == share),
                      key=lambda item: item['inputs']['seed'])

    def accuracies(self, row: Row, share: float) -> Dict[int, List[float]]:
        """Accuracies by the number of epochs that have been trained, of all seeds."""
        found = defaultdict(list)
        for item in self.of('pruned', row, share):
            found[epochs_before(item['inputs'])].append(item['ap'])
        for item in self.of('trained', row, share):
            found[item['inputs']['epochs']].append(item['ap'])
        return found


def print_tables(runs: PeerRuns, rows: Sequence[Row]) -> None:
    """Print a table for each share of the MACs or parameters, and what the figures are."""
    results, notes = Results(runs, rows), []
    for share in results.shares:
        lines = [cells for row in rows for cells in _rows(results, row, share, notes)]
        if lines:
            header = [f'-{share:.0%} of the {runs.args.of}', 'MACs', 'parameters',
                      *_columns(results.epochs)]
            dense = _rows(results, DENSE, 0., notes)
            others = [cells for cells in lines if cells[0] != DENSE.title]
            print('\n'.join([*_markdown([header, *dense, *others]), '']))
    for number, note in enumerate(notes, 1):
        print(f'[{number}] {note}')
    _print_settings(runs, results)


def _columns(epochs: Sequence[int]) -> List[str]:
    return ['right away', *(f'after {epoch} epochs' for epoch in epochs)]


def _rows(results: Results, row: Row, share: float, notes: List[str]) -> List[List[str]]:
    """The cells of a row, if anything has been measured or has failed."""
    if row == DENSE:
        share = 0.
    pruned, failed = results.of('pruned', row, share), results.of('failed', row, share)
    title = row.title
    if failed:
        notes.append(f'{row.title}, -{share:.0%}: {failed[0]["failure"]}')
        title += f' [{len(notes)}]'
    if not pruned:
        return [[title, *['-'] * (3 + len(results.epochs))]] if failed else []
    macs, params = (mean(item[name] for item in pruned) for name in ('macs', 'params'))
    by_epoch = results.accuracies(row, share)
    ceilings = results.accuracies(DENSE, 0.)
    cells = [_accuracy(by_epoch.get(epoch), ceilings.get(epoch)) for epoch in (0, *results.epochs)]
    epochs = epochs_before(pruned[0]['inputs'])
    if epochs:
        title += f' (pruned after {epochs} epochs)'
    return [[title, f'{macs / results.dense["macs"] - 1:+.1%}', f'{params / 1e6:.2f} M', *cells]]


def _accuracy(values: Optional[List[float]], ceiling: Optional[List[float]]) -> str:
    """The mean of some accuracies, their range, and what it is of that without pruning."""
    if not values:
        return '-'
    text = f'{mean(values):.3f}'
    if len(values) > 1:
        text += f' ({min(values):.3f} to {max(values):.3f})'
    return f'{text}, {mean(values) / mean(ceiling):.0%}' if ceiling and mean(ceiling) else text


def _print_settings(runs: PeerRuns, results: Results) -> None:
    """Say what has been measured, with what, and how long it takes."""
    settings = runs.settings
    seconds = [second for item in results.found['trained'] for second in item['epoch_seconds']]
    lines = [
        f'{results.dense["metric"]} of {Path(settings["config"]).stem}; mean (least to greatest '
        'of the seeds), and its ratio to that of the detector that is not pruned after as many '
        f'epochs. Tested at {settings["size"]}, trained and calibrated at '
        f'{settings["train_size"]} pixels; batches of {settings["batch_size"]} images, '
        f'AdamW with a learning rate of {runs.lr:g}; {settings["calib_batches"]} batches to '
        'calibrate with.']
    if seconds:
        lines.append(f'An epoch of training took {mean(seconds):.0f} s on average.')
    machine = describe_machine(torch.get_num_threads())
    lines.append(', '.join(f'{key} {value}' for key, value in machine.items()))
    print('\n'.join(['', *lines]))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Many plans of different widths and depths, each scored right after compensation."""
import copy
import statistics
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import torch.nn as nn

from mmgcp.analysis import count_complexity
from mmgcp.datasets.calibration import CalibrationBatches, ImagesOf
from mmgcp.deployment.timing import make_run, speedups, take_turns
from mmgcp.errors import PruningError, UserError
from mmgcp.pruning import PruningResult, prune
from mmgcp.pruning.blocks import find_blocks
from mmgcp.pruning.blocks.scores import block_costs, mean_loss
from mmgcp.pruning.depth import candidates
from mmgcp.pruning.detector import registered_name
from mmgcp.pruning.options import BUDGETS, options_of_config
from mmgcp.pruning.resume import digest_request
from mmgcp.pruning.rounding import with_default_multiple

from .accuracy import measure_accuracy
from .comparison import Entry
from .pareto_options import ParetoOptions
from .pruned_files import write_pruned
from .state import State

STATE = 'pareto-state.json'
ORIGINAL = 'original'
ROUNDS = 10  # of measuring times
TOLERANCE = 0.01  # of costs that are the same
Progress = Callable[[str, int, int], None]


@dataclass
class Pareto:
    """What was found.

    Attributes:
        rows (list[dict]): For the original, and for each plan that was tried, the ``name``, which
            is also that of its folder; the removed ``blocks``; the ``share`` that was asked for,
            None for all channels; ``parameters``, ``macs``, ``cpu_seconds`` that it took; the
            ``score`` and what it is: a ``metric`` on ``val_images`` or the ``loss``; with a
            runtime ``latency_ms``; and whether it is on the ``front``: no other one is better for
            what it costs, up to 1 %, within which budgets are met.
        notes (list[str]): Plans that were not possible, and why.
    """
    rows: List[dict] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)


def try_plans(entry: Entry, options: ParetoOptions, folder: Path,
              progress: Progress = lambda stage, done, steps: None) -> Pareto:
    """Prune copies of a detector to all combinations of widths and depths, and score them.

    Each result is written to a folder of its own, as by ``tools/prune.py``, with the plan. A run
    that was interrupted goes on where it ended.

    Args:
        entry (Entry): The detector; its config may have a ``prune_cfg``.
        options (ParetoOptions): What is tried.
        folder (Path): Where to write, a folder that exists.
        progress (Callable): Called with a stage, the plans done in it, and all of them.

    Returns:
        Pareto: What was found.

    Raises:
        UserError: There are no training images, or an option does not fit the detector.
    """
    work = _Work(entry, options, folder)
    work.original()
    plans = [(depth, share) for depth in sorted(set(options.depths))
             for share in (None, *sorted(set(options.shares), reverse=True)) if depth or share]
    for number, (depth, share) in enumerate(plans):
        progress('plans', number, len(plans))
        work.plan(depth, share)
    progress('plans', len(plans), len(plans))
    mark_front(work.found.rows)
    return work.found


def mark_front(rows: List[Dict[str, Any]]) -> None:
    """Note in rows whether no other one costs as little and is better, or is as good for less."""
    for row in rows:
        row['front'] = not any(_beats(other, row) for other in rows if other is not row)


def cost_of(row: Dict[str, Any]) -> float:
    """Return what a row costs: milliseconds if they were measured, else MACs."""
    return row.get('latency_ms', row['macs'])


def _beats(other: Dict[str, Any], row: Dict[str, Any]) -> bool:
    better = (other['score'] - row['score']) * (-1 if 'loss' in row else 1)
    if better == 0:
        return cost_of(other) < cost_of(row)
    return better > 0 and cost_of(other) <= (1 + TOLERANCE) * cost_of(row)


class _Work:
    """Plans that are being tried."""

    def __init__(self, entry: Entry, options: ParetoOptions, folder: Path):
        self.entry, self.options, self.folder = entry, options, folder
        self.found = Pareto()
        settings = options_of_config(entry.cfg.get('prune_cfg', {}), entry.name)
        self.settings = {name: value for name, value in settings.items()
                         if name not in (*BUDGETS, 'remove_blocks', 'steps', 'finetune', 'recover')}
        self.batches = CalibrationBatches(entry.cfg, entry.model, options.calib_batches)
        if next(iter(self.batches), None) is None:
            raise UserError('there are no training images to score and compensate with')
        candidates(find_blocks(entry.model, entry.shape), max(options.depths),
                   options.plain_blocks)  # an error if there are fewer
        self.state = State(folder / STATE)
        self.inputs = digest_request([asdict(options), self.settings], None, entry.model)
        self.run: Optional[Callable[[], Any]] = None
        if options.runtime is not None:
            self.run = make_run(entry.model, entry.shape, options.runtime)

    def original(self) -> None:
        """Score the detector as it is, and the blocks in the order in which they go."""
        self.first = dict(self.state.run(ORIGINAL, self.inputs, lambda: self._row(
            ORIGINAL, self.entry.model, [], None)))
        self.found.rows.append(self.first)
        self.order = self.state.run('order of blocks', self.inputs,
                                    lambda: dict(names=self._order()))['names']
        self.costs = block_costs(self.entry.model, self.order, self.entry.shape)

    def plan(self, depth: int, share: Optional[float]) -> None:
        """Try a plan that removes so many blocks, and leaves a share or all channels."""
        name = f'{depth}-blocks' + (f'-{share:g}' if share is not None else '')
        result = self.state.run(name, (self.inputs, depth, share),
                                lambda: self._try(name, self.order[:depth], share))
        if 'note' in result:
            self.found.notes.append(result['note'])
        else:
            self.found.rows.append(dict(result))

    def _order(self) -> List[str]:
        """Return the blocks in the order in which they are removed."""
        number = max(self.options.depths)
        if not number:
            return []
        options = dict(self.settings, groups='auto', remove_blocks=number,
                       plain_blocks=self.options.plain_blocks,
                       block_criterion=self.options.block_criterion, dry_run=True)
        return list(self._prune(copy.deepcopy(self.entry.model), options).absent_blocks)

    def _prune(self, model: nn.Module, options: Dict[str, Any]) -> PruningResult:
        """Prune with the images to calibrate with."""
        return with_default_multiple(partial(prune, model), dict(
            options, input_shape=self.entry.shape, batches=self.batches,
            calibration=ImagesOf(self.batches)))

    def _try(self, name: str, blocks: List[str], share: Optional[float]) -> Dict[str, Any]:
        """Prune a copy, write and score it; a note if there is no such plan."""
        start, model = time.process_time(), copy.deepcopy(self.entry.model)
        left = 1 - sum(self.costs[block][1] for block in blocks) / self.first['macs']
        if share is not None and self.run is None and left < share:
            return dict(note=f'{name} is not tried: without the blocks {left:.1%} of the MACs are '
                        'left')
        try:
            result = self._prune(model, dict(
                self.settings, remove_blocks=blocks or None, **self._to(share)))
        except PruningError as error:
            return dict(note=f'{name} is not tried: {error}')
        (self.folder / name).mkdir(exist_ok=True)
        write_pruned(result, self.entry.cfg, registered_name(type(model)), self.entry.meta,
                     self.folder / name)
        row = self._row(name, model, blocks, share)
        return dict(row, cpu_seconds=time.process_time() - start)

    def _to(self, share: Optional[float]) -> Dict[str, Any]:
        """Return the options of a budget."""
        if share is None:
            return {}
        if self.run is None:
            return dict(target_flops=share)
        return dict(target_latency=share * self.first['latency_ms'], runtime=self.options.runtime,
                    latency_table=self.folder / 'latency_table.json')

    def _row(self, name: str, model: nn.Module, blocks: List[str],
             share: Optional[float]) -> Dict[str, Any]:
        """Measure a detector."""
        start = time.process_time()
        params, macs = count_complexity(model, self.entry.shape)
        row = dict(name=name, blocks=blocks, share=share, parameters=params, macs=macs,
                   **self._score(model))
        if self.run is not None:
            row['latency_ms'] = self._time(model, blocks or share)
        return dict(row, cpu_seconds=time.process_time() - start)

    def _score(self, model: nn.Module) -> Dict[str, Any]:
        options = self.options
        if not options.val_images:
            loss = mean_loss(model, self.batches, lambda *_: None)
            return dict(score=loss, loss=loss)
        found = measure_accuracy(model, self.entry.cfg, options.metric, options.val_images)
        return dict(score=found.value, metric=found.metric, val_images=found.images)

    def _time(self, model: nn.Module, changed: Any) -> float:
        """Return the milliseconds of an image; of a pruned detector in turns with the original."""
        if not changed:
            return statistics.median(take_turns([self.run], ROUNDS)[0])
        other = make_run(model, self.entry.shape, self.options.runtime)
        return self.first['latency_ms'] / speedups(take_turns([self.run, other], ROUNDS))[1]

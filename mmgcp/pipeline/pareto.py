# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Many plans of different widths and depths, each scored right after compensation."""
import copy
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
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
from mmgcp.utils.config import at_width, image_size, with_fixed_size
from mmgcp.utils.detectors import load_detector

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
        rows (list[dict]): For the original, for each plan that was tried, and for these on images
            of other sizes, the ``name``; the ``model``, which is also the name of its folder; the
            removed ``blocks``; the ``share`` that was asked for, None for all channels; the
            ``image_size``, width and height in pixels; ``parameters``, ``macs``, ``cpu_seconds``
            that it took; the ``score`` and what it is: a ``metric`` on ``val_images`` or the
            ``loss``; with a runtime ``latency_ms``; and whether it is on the ``front``: no other
            one is better for what it costs, up to 1 %, within which budgets are met.
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
    resized = [(row, width) for row in list(work.found.rows) for width in work.widths()]
    for number, (row, width) in enumerate(resized):
        progress('image sizes', number, len(resized))
        work.resized(row, width)
    progress('image sizes', len(resized), len(resized))
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
        for width in self.widths():
            at_width(entry.cfg, width)  # an error if that is not possible
        self.state = State(folder / STATE)
        given = asdict(replace(options, image_widths=()))  # which change no plan
        self.inputs = digest_request([given, self.settings], None, entry.model)
        self.run: Optional[Callable[[], Any]] = None
        if options.runtime is not None:
            self.run = make_run(entry.model, entry.shape, options.runtime)

    def original(self) -> None:
        """Score the detector as it is, and the blocks in the order in which they go."""
        self.first = dict(self.state.run(ORIGINAL, self.inputs, lambda: self._row(
            self.entry, dict(name=ORIGINAL, model=ORIGINAL, blocks=[], share=None))))
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

    def widths(self) -> List[int]:
        """Return the widths of images besides the config's own."""
        return sorted(set(self.options.image_widths) - {self.entry.shape[2]}, reverse=True)

    def resized(self, row: Dict[str, Any], width: int) -> None:
        """Measure the model of a row on images of another width, without changing it."""
        name = f'{row["model"]}@{width}'
        self.found.rows.append(dict(self.state.run(
            name, (self.inputs, row['model'], width), lambda: self._resize(row, name, width))))

    def _resize(self, row: Dict[str, Any], name: str, width: int) -> Dict[str, Any]:
        model = self.entry.model
        if row['model'] != ORIGINAL:
            folder = self.folder / row['model']
            model = load_detector(str(folder / 'pruned.py'), str(folder / 'pruned.pth')).model
        entry = Entry(name, model, at_width(self.entry.cfg, width))
        return self._row(entry, {**{key: row[key] for key in ('model', 'blocks', 'share')},
                                 'name': name})

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
        entry = replace(self.entry, name=name, model=model)
        row = self._row(entry, dict(name=name, model=name, blocks=blocks, share=share))
        return dict(row, cpu_seconds=time.process_time() - start)

    def _to(self, share: Optional[float]) -> Dict[str, Any]:
        """Return the options of a budget."""
        if share is None:
            return {}
        if self.run is None:
            return dict(target_flops=share)
        return dict(target_latency=share * self.first['latency_ms'], runtime=self.options.runtime,
                    latency_table=self.folder / 'latency_table.json')

    def _row(self, entry: Entry, about: Dict[str, Any]) -> Dict[str, Any]:
        """Measure a detector on images of its size."""
        start = time.process_time()
        params, macs = count_complexity(entry.model, entry.shape)
        row = dict(about, image_size=list(image_size(entry.cfg)), parameters=params, macs=macs,
                   **self._score(entry))
        if self.run is not None:
            row['latency_ms'] = self._time(entry, about['name'] != ORIGINAL)
        return dict(row, cpu_seconds=time.process_time() - start)

    def _score(self, entry: Entry) -> Dict[str, Any]:
        options = self.options
        if not options.val_images:
            loss = mean_loss(entry.model, self.batches, lambda *_: None)
            return dict(score=loss, loss=loss)
        found = measure_accuracy(entry.model, with_fixed_size(entry.cfg), options.metric,
                                 options.val_images)
        return dict(score=found.value, metric=found.metric, val_images=found.images)

    def _time(self, entry: Entry, changed: bool) -> float:
        """Return the milliseconds of an image; of a changed detector in turns with the original."""
        if not changed:
            return statistics.median(take_turns([self.run], ROUNDS)[0])
        other = make_run(entry.model, entry.shape, self.options.runtime)
        return self.first['latency_ms'] / speedups(take_turns([self.run, other], ROUNDS))[1]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors side by side: accuracy, size, memory, and time in the programs that run them."""
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch.nn as nn
from mmengine.config import Config

from mmgcp.analysis import count_complexity, measure_peak_memory
from mmgcp.datasets import check_voc
from mmgcp.datasets.calibration import calibration_batches
from mmgcp.deployment import (
    ExportOptions,
    evaluate_exported,
    export_detector,
    fused,
    open_exported,
)
from mmgcp.deployment.check import sample_images
from mmgcp.deployment.exported import is_installed
from mmgcp.deployment.timing import speedups, take_turns, torch_run
from mmgcp.errors import UserError
from mmgcp.pruning.prunable import shape_or_leave_head_out
from mmgcp.utils.config import image_size, with_fixed_size
from mmgcp.utils.detectors import load_detector

from .accuracy import measure_accuracy
from .compare_options import CompareOptions
from .voc_data import use_voc_data

TORCH, ONNX, INT8 = 'PyTorch', 'onnxruntime', 'int8'  # what runs them
NEEDED = ('onnx', 'onnxruntime')
Run = Callable[[], Any]
Progress = Callable[[str, int, int], None]


@dataclass
class Entry:
    """A detector that is compared.

    Attributes:
        name (str): Its name in tables.
        model (nn.Module): The detector, on the CPU. Its head is left out of all runs if it does
            not run on an image alone.
        cfg (Config): Its config.
        meta (dict): The ``meta`` of its checkpoint.
        origin (dict): ``config`` and ``checkpoint``, as they were given.
        shape (tuple[int]): Shape (C, H, W) of its test images in pixels.
    """
    name: str
    model: nn.Module
    cfg: Config
    meta: dict = field(default_factory=dict)
    origin: Dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        width, height = image_size(self.cfg)
        channels = shape_or_leave_head_out(self.model, (3, height, width))[0]
        self.shape = (channels, height, width)


@dataclass
class Comparison:
    """What was found.

    Attributes:
        rows (list[dict]): For each detector ``name``, ``config``, ``checkpoint``, ``input_size``
            (width and height), ``parameters``, ``macs``, ``peak_memory_bytes``,
            ``checkpoint_bytes`` (None for one that is no file); by the program that runs it,
            ``latency_ms``, ``speedup`` against the first detector, ``promise_kept`` (the speed-up
            divided by that of the MACs) and ``file_bytes``; and, where it was measured,
            ``metric`` and, by the program, ``accuracy``.
        notes (list[str]): What could not be measured, and why.
    """
    rows: List[dict]
    notes: List[str] = field(default_factory=list)


def load_entries(configs: Sequence[str], checkpoints: Sequence[str],
                 names: Optional[Sequence[str]] = None, cfg_options: Optional[dict] = None,
                 data: Optional[str] = None) -> List[Entry]:
    """Load detectors to be compared.

    Args:
        configs (Sequence[str]): Their configs.
        checkpoints (Sequence[str]): Their checkpoints.
        names (Sequence[str], optional): Their names. Defaults to those of the checkpoints, with
            as many folders as it takes to make them different.
        cfg_options (dict, optional): Settings of all configs to override.
        data (str, optional): Folder in VOC's layout that takes the place of the configs' data.

    Returns:
        list[Entry]: The detectors.

    Raises:
        UserError: One cannot be loaded.
    """
    names, voc = names or different_names(checkpoints), check_voc(data) if data else None
    entries = []
    for name, config, checkpoint in zip(names, configs, checkpoints):
        model, cfg, meta = load_detector(config, checkpoint, cfg_options)
        if voc is not None:
            if not (cfg.get('train_dataloader') and cfg.get('val_dataloader')):
                raise UserError(f'the config {config} has no data whose place others could take')
            use_voc_data(cfg, voc)
        entries.append(Entry(name, model, cfg, meta, dict(config=config, checkpoint=checkpoint)))
    return entries


def different_names(paths: Sequence[str]) -> List[str]:
    """The last parts of paths, as many as it takes to tell them apart; else with numbers."""
    parts = [Path(path).with_suffix('').parts for path in paths]
    for number in range(1, max(map(len, parts), default=0) + 1):
        names = ['/'.join(part[-number:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f'{part[-1]} {number}' for number, part in enumerate(parts, 1)]


def compare(entries: Sequence[Entry], options: CompareOptions, exported: bool = True,
            progress: Progress = lambda stage, done, steps: None) -> Comparison:
    """Compare detectors.

    Accuracy and time are of the same images: those of validation, all of one size, with the size
    of the test pipeline. Detectors take turns in each program, one image each in a round.

    Args:
        entries (Sequence[Entry]): The detectors, to the first of which the others are compared.
        options (CompareOptions): How.
        exported (bool): Whether they are exported, and run in onnxruntime, too. Defaults to True.
        progress (Callable): Called with a stage, the detectors done in it, and all of them.

    Returns:
        Comparison: What was found, and what was not.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = _Work(entries, options, Path(folder), progress)
        work.measure_sizes()
        work.measure_accuracies()
        if exported:
            work.export()
        work.measure_times()
        work.measure_accuracies_of_integers()
        return work.result


class _Work:
    """A comparison that is being made."""

    def __init__(self, entries: Sequence[Entry], options: CompareOptions, folder: Path,
                 progress: Progress):
        self.entries, self.options, self.progress = entries, options, progress
        self.folder = folder
        self.result = Comparison([dict(name=entry.name, **entry.origin, file_bytes={})
                                  for entry in entries])
        self.networks = [self._fused(entry) for entry in entries]
        self.files: Dict[str, List[Optional[Path]]] = {}  # by what runs them

    def note(self, text: str) -> None:
        """Say once what could not be measured."""
        if text not in self.result.notes:
            self.result.notes.append(text)

    def _fused(self, entry: Entry) -> nn.Module:
        try:
            return fused(entry.model, entry.shape)
        except UserError as error:
            self.note(f'{entry.name} is not fused: {error}')
            return entry.model

    def measure_sizes(self) -> None:
        for number, (entry, row) in enumerate(zip(self.entries, self.result.rows)):
            self.progress('sizes', number, len(self.entries))
            params, macs = count_complexity(entry.model, entry.shape)
            checkpoint = Path(entry.origin.get('checkpoint', ''))
            network = self.networks[number]
            run = torch_run(network, entry.shape, self.options.threads)
            row.update(
                input_size=[entry.shape[2], entry.shape[1]], parameters=params, macs=macs,
                peak_memory_bytes=measure_peak_memory(network, run),
                checkpoint_bytes=checkpoint.stat().st_size if checkpoint.is_file() else None)
        self.progress('sizes', len(self.entries), len(self.entries))

    def export(self) -> None:
        """Write all detectors as files of ONNX, if that is possible."""
        missing = [package for package in NEEDED if not is_installed(package)]
        if missing:
            self.note(f'not measured in onnxruntime: that needs {" and ".join(missing)} '
                      f'(pip install {" ".join(missing)})')
            return
        self.files[ONNX] = [None] * len(self.entries)
        if self.options.int8:
            self.files[INT8] = [None] * len(self.entries)
        for number, entry in enumerate(self.entries):
            self.progress('exporting', number, len(self.entries))
            try:
                files = self._export(entry, self.folder / f'{number}.onnx')
            except UserError as error:
                self.note(f'{entry.name} is not measured in onnxruntime: {error}')
                continue
            for kind, path in zip((ONNX, INT8), files):
                self.files[kind][number] = path
                self.result.rows[number]['file_bytes'][kind] = path.stat().st_size
        self.progress('exporting', len(self.entries), len(self.entries))

    def _export(self, entry: Entry, path: Path) -> List[Path]:
        """Export a detector; with integers, too, if that is wanted and there are images."""
        int8 = self.options.int8
        try:
            if int8 and next(calibration_batches(entry.cfg, entry.model, 1), None) is None:
                raise UserError('there are no training images')
        except UserError as error:
            self.note(f'{entry.name} is not measured with integers: {error}')
            int8 = False
        options = ExportOptions(int8=int8, weight_bits=self.options.weight_bits,
                                calib_batches=self.options.calib_batches, val_images=0)
        return export_detector(entry.model, entry.cfg, path, entry.shape, options, entry.meta,
                               report=lambda text: None).files

    def measure_times(self) -> None:
        """Let detectors take turns in each program, and compare them with the first one."""
        runs = {TORCH: [torch_run(network, entry.shape, self.options.threads)
                        for network, entry in zip(self.networks, self.entries)]}
        for kind, paths in self.files.items():
            runs[kind] = [path and self._file_run(path, entry)
                          for path, entry in zip(paths, self.entries)]
        clock = time.process_time if self.options.threads == 1 else time.perf_counter
        for step, (kind, found) in enumerate(runs.items()):
            self.progress('times', step, len(runs))
            there = [number for number, run in enumerate(found) if run]
            taken = take_turns([found[number] for number in there], self.options.rounds,
                               clock=clock)
            rows = [self.result.rows[number] for number in there]
            factors = speedups(taken) if 0 in there else [None] * len(there)
            for row, times, factor in zip(rows, taken, factors):
                row.setdefault('latency_ms', {})[kind] = statistics.median(times)
                if factor is not None:
                    share = row['macs'] / self.result.rows[0]['macs']
                    row.setdefault('speedup', {})[kind] = factor
                    row.setdefault('promise_kept', {})[kind] = factor * share
        self.progress('times', len(runs), len(runs))

    def _file_run(self, path: Path, entry: Entry) -> Run:
        opened = open_exported(path, self.options.threads)
        images = sample_images(entry.model, (1, *entry.shape))
        return lambda: opened.run_batch(images)

    def measure_accuracies(self) -> None:
        """Measure the accuracy in PyTorch."""
        for number, (entry, row) in enumerate(zip(self.entries, self.result.rows)):
            if not self.options.val_images:
                return
            self.progress('accuracies', number, len(self.entries))
            try:
                found = measure_accuracy(entry.model, with_fixed_size(entry.cfg),
                                         self.options.metric, self.options.val_images)
            except UserError as error:
                if self.options.metric is not None:
                    raise
                self.note(f'the accuracy of {entry.name} is not measured: {error}')
                continue
            row.update(metric=found.metric, val_images=found.images,
                       accuracy={TORCH: found.value})
        self.progress('accuracies', len(self.entries), len(self.entries))

    def measure_accuracies_of_integers(self) -> None:
        """Measure the accuracy of files with integers on the same images."""
        for entry, row, path in zip(self.entries, self.result.rows, self.files.get(INT8, ())):
            if path and 'accuracy' in row:
                row['accuracy'][INT8] = evaluate_exported(
                    open_exported(path, self.options.threads), entry.model,
                    with_fixed_size(entry.cfg), row['metric'], row['val_images'])[1]

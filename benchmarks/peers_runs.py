# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The runs behind a comparison of peers: training before, pruning, testing, training after."""
import argparse
import copy
import os
import random
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.config import Config
from peers_data import describe, with_test_data, with_training_data
from peers_pruning import PRUNERS, Pruned, Task, load_pruned, make_distiller, save_pruned
from peers_rows import DENSE, Row, epochs_before
from peers_training import LR, OPTIM_WRAPPER, average, train
from runs import Runs, base

from mmgcp.analysis import count_complexity
from mmgcp.datasets.calibration import calibration_batches, evaluate
from mmgcp.pipeline.child_config import override
from mmgcp.pipeline.recovery import recover
from mmgcp.pipeline.stage_configs import sparsity_hook
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.config import build_detector, image_size, load_config
from mmgcp.utils.devices import find_device

CALIBRATION_BATCH, TEST_BATCH = 8, 16  # images


class PeerRuns(Runs):
    """The pruned detectors that are compared.

    Args:
        folder (Path): Where results are.
        args (argparse.Namespace): See :func:`parse_args`.

    Attributes:
        settings (dict): What all results depend on.
        rates (dict): What trainings depend on besides.
    """

    def __init__(self, folder: Path, args: argparse.Namespace):
        super().__init__(folder)
        self.args = args
        cfg = load_config(args.config, copy.deepcopy(args.cfg_options))
        size = args.size or image_size(cfg)[0]
        train_size = args.train_size or size
        self.shape = (3, size, size)
        self.cfg = with_test_data(
            with_training_data(cfg, args.train, train_size, args.batch_size, args.augment),
            args.val, size, TEST_BATCH)
        self.calibration = with_training_data(cfg, args.calibration, train_size,
                                              CALIBRATION_BATCH, args.augment)
        self.cfg.optim_wrapper = copy.deepcopy(OPTIM_WRAPPER)
        self.lr = args.lr or LR
        self.rates = dict(lr=self.lr, optimizer=OPTIM_WRAPPER['optimizer'])
        self.settings = dict(
            config=base(args.config), checkpoint=os.path.abspath(args.checkpoint), size=size,
            train_size=train_size, calibration=describe(args.calibration),
            train=describe(args.train), val=describe(args.val and [args.val]),
            batch_size=args.batch_size, augment=args.augment,
            calib_batches=args.calib_batches, cfg_options=repr(args.cfg_options),
            **(dict(of=args.of) if args.of != 'MACs' else {}))
        # In names: results for MACs and for parameters are side by side
        self._of = '' if args.of == 'MACs' else f'-of-{args.of}'
        self._pruned: Tuple[Any, Any] = (None, None)  # name of what was pruned last, and that
        self._batches: Optional[list] = None

    def is_done(self, name: str, inputs: dict) -> bool:
        return super().is_done(name, dict(inputs, settings=self.settings))

    def finish(self, name: str, inputs: dict, values: dict) -> None:
        super().finish(name, dict(inputs, settings=self.settings), values)

    def measure(self, model: nn.Module) -> float:
        """The accuracy of a detector."""
        metric, accuracy = evaluate(model, self.cfg)
        print(f'  {metric} {accuracy:.3f}', file=sys.stderr, flush=True)
        return accuracy

    def prune(self, row: Row, share: float, seed: int) -> str:
        """Prune and test right away; returns the name of the run."""
        name, inputs = self.describe_pruning(row, share, seed)
        if not self.is_done(name, inputs):
            pruned, seconds = self.make(row, share, seed)
            start = time.perf_counter()
            metric, accuracy = evaluate(pruned.model, self.cfg)
            params, macs = count_complexity(pruned.model, self.shape)
            self.finish(name, inputs, dict(
                ap=accuracy, metric=metric, params=params, macs=macs, seconds=seconds,
                test_seconds=time.perf_counter() - start))
            print(f'  {metric} {accuracy:.3f}, {macs / 1e9:.3f} GMACs, pruned in {seconds:.0f} s',
                  file=sys.stderr, flush=True)
        return name

    def name_of(self, row: Row, share: float, seed: int) -> str:
        """The folder of a pruning."""
        return f'{row.name}-{share:g}{self._of}-{seed}'

    def describe_pruning(self, row: Row, share: float, seed: int) -> Tuple[str, dict]:
        """The name of a pruning, and what its result depends on."""
        seed = seed if row.first or row.has_chance else 0
        inputs = dict(kind='pruned', row=row.record, share=share, seed=seed)
        if row.first:
            inputs['first'] = self.describe_first(row, seed)[1]
        return self.name_of(row, share, seed), inputs

    def make(self, row: Row, share: float, seed: int) -> Tuple[Pruned, float]:
        """Prune, unless that has been done before; also returns the time it takes."""
        name, inputs = self.describe_pruning(row, share, seed)
        if self._pruned[0] == name:
            return self._pruned[1]
        kept = self.folder / name / 'pruned.pth'
        if kept.exists() and self.is_done(name, inputs):
            self._pruned = name, (load_pruned(kept), self.result(name)['seconds'])
        else:
            model, cfg = self.train_first(row, seed) if row.first else self.load()
            task = Task(model, cfg, share, self.shape, self.batches, row.options,
                        inputs['seed'] if row.has_chance else None, of=self.args.of)
            if row.between:
                task.finetune = lambda model, _: self.recover(model, row.between, inputs['seed'])
            print(f'{name}: pruning', file=sys.stderr, flush=True)
            start = time.perf_counter()
            pruned = PRUNERS[row.pruner](task)
            self._pruned = name, (pruned, time.perf_counter() - start)
            if row.pruner == 'mmgcp':
                (self.folder / name / 'result.json').unlink(missing_ok=True)  # of another one
                save_pruned(pruned, kept)
        return self._pruned[1]

    def finetune(self, row: Row, share: float, seed: int, epochs: int) -> None:
        """Train what has been pruned until there have been so many epochs, and test it."""
        name, inputs = self.describe_training(row, share, seed, epochs)
        spent = epochs_before(inputs)
        if epochs <= spent or self.is_done(name, inputs):
            return
        print(f'{name}: training', file=sys.stderr, flush=True)
        pruned, _ = self.make(row, share, seed)
        trained = student = copy.deepcopy(pruned.model)
        if row.after == 'distil':
            teacher = self.folder / 'teacher.py'
            self.cfg.dump(teacher)
            trained = make_distiller(pruned, teacher, self.settings['checkpoint'])
            student = trained.student
        if row.after == 'recover':
            seconds = self.recover(student, epochs - spent, seed)
        else:
            seconds = train(trained, self.cfg, epochs - spent, self.lr, seed)
        found = dict(ap=self.measure(student), epoch_seconds=seconds)
        average(student, pruned.model)
        self.finish(name, inputs, dict(found, averaged_ap=self.measure(student)))

    def recover(self, student: nn.Module, epochs: int, seed: int) -> List[float]:
        """Let a pruned detector follow the original on the images to train with.

        All that chance decides is the order of the batches, which seed 0 leaves as it is.

        Returns the seconds that each epoch took on average.
        """
        teacher = self.load()[0]
        images = [batch.images for batch in calibration_batches(
            self.cfg, teacher, sys.maxsize, CALIBRATION_BATCH)]
        if seed:
            random.Random(seed).shuffle(images)
        start = time.perf_counter()
        recover(student, teacher, images, steps=epochs * len(images))
        return [(time.perf_counter() - start) / epochs] * epochs

    def describe_training(self, row: Row, share: float, seed: int,
                          epochs: int) -> Tuple[str, dict]:
        """The name of a training after pruning, and what its result depends on."""
        pruning = self.describe_pruning(row, share, seed)[1]
        inputs = dict(pruning, kind='trained', seed=seed, epochs=epochs, **self.rates)
        return f'{self.name_of(row, share, seed)}-{epochs}epochs', inputs

    def train_first(self, row: Row, seed: int) -> Tuple[nn.Module, Config]:
        """The detector after what it is trained with before pruning; its config."""
        name, inputs = self.describe_first(row, seed)
        model, cfg = self.load(attention=row.first == 'attention')
        weights = self.folder / name / 'weights.pth'
        if self.is_done(name, inputs):
            load_strictly(model, str(weights))
            return model, cfg
        print(f'{name}: training before pruning', file=sys.stderr, flush=True)
        hooks = []
        if row.first != 'attention':
            hooks = [dict(sparsity_hook(cfg, self.args.sparsity_rate, schedule=row.first),
                          histogram_interval=0)]
        seconds = train(model, cfg, self.args.first_epochs, self.lr, seed, hooks)
        weights.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), weights)
        self.finish(name, inputs, dict(ap=self.measure(model), epoch_seconds=seconds))
        return model, cfg

    def describe_first(self, row: Row, seed: int) -> Tuple[str, dict]:
        """The name of a training before pruning, and what its result depends on."""
        inputs = dict(kind='first', first=row.first, seed=seed, epochs=self.args.first_epochs,
                      **self.rates)
        if row.first != 'attention':
            inputs['rate'] = self.args.sparsity_rate
        return f'first-{row.first}{self._of}-{seed}', inputs

    def load(self, attention: bool = False) -> Tuple[nn.Module, Config]:
        """The trained detector, if asked for with attention that has not been trained.

        It is where MMEngine trains: on the GPU if there is one.
        """
        model, cfg = build_detector(self.cfg).to(find_device()), self.cfg
        load_strictly(model, self.settings['checkpoint'], self.args.config)
        if not attention:
            return model, cfg
        cfg = override(cfg, {'model.type': 'mmgcp.SCADetector',
                             'model.detector_type': cfg.model.type})
        with_attention = build_detector(cfg).to(find_device())
        with_attention.load_state_dict(model.state_dict(), strict=False)
        return with_attention, cfg

    @property
    def batches(self) -> list:
        """What to calibrate with, the same each time."""
        if self._batches is None:
            self._batches = list(calibration_batches(
                self.calibration, self.load()[0], self.args.calib_batches, CALIBRATION_BATCH))
        return self._batches

    @contextmanager
    def failure_noted(self, row: Row, share: float, seed: int) -> Iterator[None]:
        """Remember why a row cannot be measured, and go on; a later start tries it again."""
        name = f'{self.name_of(row, share, seed)}-failed'
        try:
            yield
        except Exception as error:  # peers raise anything
            traceback.print_exc()
            reason = ' '.join(str(error).split()) or 'no message'
            self.finish(name, dict(kind='failed', row=row.record, share=share, seed=seed),
                        dict(failure=f'{type(error).__name__}: {reason}'))
        else:
            path = self.folder / name / 'result.json'
            if path.exists():
                path.unlink()


def compare(runs: PeerRuns, rows: Sequence[Row]) -> None:
    """Prune, test and train everything; what fails is a result."""
    args = runs.args
    runs.prune(DENSE, 0., 0)  # if that fails, all would
    for row in rows:
        trained = [0.] if row.pruner == 'none' else args.remove
        shares = trained if row.pruner == 'none' else sorted({*trained, *args.also_remove})
        for share in shares:
            for seed in args.seeds:
                with runs.failure_noted(row, share, seed):
                    runs.prune(row, share, seed)
                    for epochs in args.epochs if share in trained else ():
                        runs.finetune(row, share, seed, epochs)

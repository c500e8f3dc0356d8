# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Trainings and tests with the standard tools, of which finished ones are not run again."""
import hashlib
import json
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean
from typing import Callable, Dict, List, Optional, Sequence
from unittest import mock

from mmengine.config import Config
from prune_speed import ROOT

from mmgcp.errors import UserError
from mmgcp.pipeline.child_config import write_child
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.cli import replacing

METRICS = {'mAP50': 'pascal_voc/AP50', 'mAP': 'pascal_voc/mAP'}


class Runs:
    """Runs in a folder, each in one of its own with its inputs and result as result.json.

    Args:
        folder (Path): The folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)

    def results(self, kind: str) -> List[dict]:
        """All that is finished of a kind."""
        found = [json.loads(path.read_text()) for path in self.folder.glob('*/result.json')]
        return [item for item in found if item['inputs']['kind'] == kind]

    def result(self, name: str) -> Optional[dict]:
        """What a run led to, None if it is not finished."""
        path = self.folder / name / 'result.json'
        return json.loads(path.read_text()) if path.exists() else None

    def is_done(self, name: str, inputs: dict) -> bool:
        """Whether a run is finished with these inputs."""
        result = self.result(name)
        return result is not None and result['inputs'] == inputs

    def finish(self, name: str, inputs: dict, values: dict) -> None:
        """Remember what a run led to."""
        (self.folder / name).mkdir(exist_ok=True)
        with replacing(self.folder / name / 'result.json') as (path, ):
            path.write_text(json.dumps(dict(inputs=inputs, **values), indent=2) + '\n')

    def train(self, name: str, base: str, change: Callable[[Config], Config], seed: int,
              inputs: dict, logged: Sequence[str] = ()) -> Path:
        """Train with a config, which goes to NAME.py; returns the last checkpoint.

        Args:
            name (str): Name of the run.
            base (str): The config that it inherits from.
            change (Callable): Turns that into the config to train with.
            seed (int): Random seed.
            inputs (dict): What else the result depends on, and its kind.
            logged (Sequence[str]): Logged values that belong to the result.
        """
        config = self.folder / f'{name}.py'
        write_child(config, base, change)
        inputs = dict(inputs, config=digest(config.read_text()), seed=seed)
        if not self.is_done(name, inputs):
            self.run('train.py', config, '--work-dir', self.folder / name, '--cfg-options',
                     f'randomness.seed={seed}')
            log = read_log(self.folder / name)
            self.finish(name, inputs, dict(metrics(log), **{key: log[key] for key in logged}))
        return self.checkpoint(name)

    def test(self, folder: Path) -> Dict[str, float]:
        """Test the pruned detector in a folder."""
        # Workers that are left behind in this process would be waited for
        loading = dict(num_workers=0, persistent_workers=False)
        self.run('test.py', folder / 'pruned.py', folder / 'pruned.pth', '--work-dir',
                 folder / 'test', '--cfg-options',
                 *(f'test_dataloader.{key}={value}' for key, value in loading.items()))
        path = max((folder / 'test').glob('*/*.json'))
        return metrics(json.loads(path.read_text()))

    def run(self, tool: str, *arguments: object) -> None:
        """Run a tool with its output on stderr, trainings in a process of their own.

        Raises:
            UserError: It failed.
        """
        command = [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)]
        print(' '.join(command), file=sys.stderr, flush=True)
        if tool != 'train.py':
            main = runpy.run_path(command[1])['main']
            with mock.patch.object(sys, 'argv', command[1:]), redirect_stdout(sys.stderr):
                main()
        elif subprocess.run(command, stdout=sys.stderr).returncode:
            raise UserError(f'{tool} failed')

    def checkpoint(self, name: str) -> Path:
        """The last checkpoint of a training."""
        return Path((self.folder / name / 'last_checkpoint').read_text())


def takes_seed(criterion: dict) -> bool:
    """Whether a criterion depends on a seed."""
    try:
        TASK_UTILS.build(dict(criterion, seed=0))
    except (TypeError, UserError):  # of the constructor
        return False
    return True


def base(config: str) -> str:
    """The base of a child config, wherever that is."""
    return config if '::' in config else os.path.abspath(config)


def train_for(epochs: int) -> dict:
    """Settings to train for so many epochs, and to validate and save at their end alone."""
    return {
        'train_cfg.max_epochs': epochs, 'train_cfg.val_interval': epochs,
        'default_hooks.param_scheduler.max_epochs': epochs,
        'default_hooks.checkpoint.interval': epochs, 'default_hooks.checkpoint.save_best': None}


def evaluation() -> dict:
    """Settings to measure mAP over the IoU thresholds from 0.5 to 0.95, in VOC's way."""
    thresholds = [percent / 100 for percent in range(50, 100, 5)]
    return {f'{name}_evaluator.iou_thrs': thresholds for name in ('val', 'test')}


def read_log(folder: Path) -> Dict[str, float]:
    """The last value of everything that the last training in a folder logged."""
    path = max(folder.glob('*/vis_data/scalars.json'))
    values = {}
    for line in path.read_text().splitlines():
        values.update(json.loads(line))
    return values


def metrics(values: Dict[str, float]) -> Dict[str, float]:
    """Those that count of all."""
    return {name: values[key] for name, key in METRICS.items()}


def digest(value: object) -> str:
    """A short name for the text of a value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def pair(items: List[dict]) -> str:
    """The means of both metrics."""
    if not items:
        return '-'
    return ' / '.join(f'{mean(item[name] for item in items):.3f}' for name in METRICS)

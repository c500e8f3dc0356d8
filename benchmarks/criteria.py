# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Every pruning criterion at several budgets of MACs, on a trained detector and real data.

The detector is pruned with each criterion to each budget: its accuracy right after pruning,
without and with compensation, and after a short fine-tuning at one of the budgets. CPSCA prunes
the detector after as short a training with its attention modules. A run that is finished is not
run again; each start prints all that is there.

With --cost instead: the CPU time that tools/prune.py's work takes on the full-size YOLOv4 with
random weights, and its peak of memory, each in a process of its own. Criteria that go layer by
layer are stopped after the first channel units, and their time for a unit is printed.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Dict, List, Optional, Tuple

import torch
from mmengine.config import Config
from prune_speed import ROOT, _build, _markdown, _memory, _reset_peak, describe_machine
from runs import Runs, digest, evaluation, takes_seed

from mmgcp.errors import UserError
from mmgcp.nn.training_loss import Batch
from mmgcp.pipeline.child_config import override
from mmgcp.pipeline.schedules import derive_schedule
from mmgcp.pruning import prune
from mmgcp.pruning.scores import criterion_names
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import image_size, load_config

LARGE_CONFIG = ROOT / 'configs' / 'yolov4' / 'yolov4_fast_1xb64-50e_voc.py'
CRITERIA = criterion_names()
BYTES = 2**20
# So many sets are pruned to measure the time for one
TIMED_SETS = 4


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', nargs='?', help='config of the trained detector')
    parser.add_argument('checkpoint', nargs='?')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/criteria/CONFIG_NAME')
    parser.add_argument('--criteria', nargs='+', choices=CRITERIA, default=CRITERIA,
                        metavar='NAME', help=f'among {", ".join(CRITERIA)}; default: all')
    parser.add_argument('--remove', type=float, nargs='*', default=[0.25, 0.5, 0.75],
                        help='shares of the MACs; default: 0.25 0.5 0.75')
    parser.add_argument('--calib-batches', type=int, default=8, help='default: 8')
    parser.add_argument('--finetune-at', type=float, nargs='*', default=[0.5],
                        help='the budgets to fine-tune at; default: 0.5')
    parser.add_argument('--epochs', type=int, default=6, help='of fine-tuning; default: 6')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0],
                        help='of fine-tuning, and of criteria with chance in them; default: 0')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='settings of the config to override in all prunings, such as '
                        'prune_cfg.criterion.epochs=3')
    parser.add_argument('--cost', action='store_true')
    parser.add_argument('--large-config', default=str(LARGE_CONFIG), help=argparse.SUPPRESS)
    parser.add_argument('--child', help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_args()
    if args.child:
        print(json.dumps(measure_cost(args.child, args.large_config, args.calib_batches)))
    elif args.cost:
        names = [name for name in args.criteria if name != 'CPSCA']  # for it, one has to train
        print_costs([cost_in_process(name, args) for name in names], args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Prune, test and fine-tune, and print all results."""
    if not args.checkpoint:
        raise UserError('give the config of a trained detector and its checkpoint, or --cost')
    name = Path(args.config).stem
    runs = CriteriaRuns(args.work_dir or Path('work_dirs') / 'criteria' / name, args)
    for criterion in args.criteria:
        for seed in args.seeds:
            for share in args.remove:
                for compensate in (False, True):
                    runs.prune(criterion, share, compensate, seed)
            for share in args.finetune_at:
                runs.finetune(criterion, share, seed)
    print_results(runs)


class CriteriaRuns(Runs):
    """The pruned networks that are compared.

    Args:
        folder (Path): Where they are.
        args (argparse.Namespace): See :func:`parse_args`.
    """

    def __init__(self, folder: Path, args: argparse.Namespace):
        super().__init__(folder)
        self.args = args

    def prune(self, criterion: str, share: float, compensate: bool, seed: int) -> Path:
        """Prune with a criterion and test; returns the folder of the pruned network."""
        kind = dict(type=f'mmgcp.{criterion}')
        if takes_seed(kind):
            kind['seed'] = seed
        name = f'{criterion}-{share:g}-{kind.get("seed", 0)}{"" if compensate else "-plain"}'
        config, checkpoint = self.args.config, self.args.checkpoint
        if criterion == 'CPSCA':
            config, checkpoint = self.train_with_attention()
        inputs = dict(kind='pruned', criterion=criterion, share=share, compensate=compensate,
                      config=os.path.abspath(config), checkpoint=str(checkpoint),
                      calib_batches=self.args.calib_batches, seed=kind.get('seed'),
                      cfg_options=self.args.cfg_options)
        folder = self.folder / name
        if not self.is_done(name, inputs):
            start = time.perf_counter()
            self.run('prune.py', config, checkpoint, '--work-dir', folder,
                     '--target-flops', round(1 - share, 6), '--round-to', 1,
                     '--calib-batches', self.args.calib_batches, '--val-images', 0,
                     *([] if compensate else ['--no-compensate']), '--cfg-options',
                     *(f'prune_cfg.criterion.{key}={value}' for key, value in kind.items()),
                     *self.args.cfg_options)
            seconds = time.perf_counter() - start
            self.finish(name, inputs, dict(self.test(folder), seconds=seconds))
        return folder

    def train_with_attention(self) -> Tuple[Path, Path]:
        """Train the detector with CPSCA's attention; returns config and last checkpoint."""
        config, name = os.path.abspath(self.args.config), 'attention'
        cfg = load_config(config)
        settings = {
            'load_from': os.path.abspath(self.args.checkpoint), 'model.type': 'mmgcp.SCADetector',
            'model.detector_type': cfg.model.type, **self.short_schedule(cfg)}
        checkpoint = self.train(
            name, config, lambda cfg: override(cfg, settings), 0, dict(kind='attention'))
        return self.folder / f'{name}.py', checkpoint

    def finetune(self, criterion: str, share: float, seed: int) -> Path:
        """Fine-tune a compensated network; returns the last checkpoint."""
        pruned = self.prune(criterion, share, True, seed).name
        settings = self.short_schedule(load_config(str(self.folder / pruned / 'pruned.py')))
        return self.train(
            f'{criterion}-{share:g}-finetuned-{seed}', f'./{pruned}/pruned.py',
            lambda cfg: override(cfg, settings), seed, dict(
                kind='finetuned', criterion=criterion, share=share, epochs=self.args.epochs,
                start=digest(self.result(pruned))))

    def short_schedule(self, cfg: Config) -> dict:
        """Settings to train for ``--epochs`` epochs and to validate at their end alone."""
        data = cfg.train_dataloader.dataset
        images = Path(data.data_root, data.ann_file).read_text().split()
        schedule = derive_schedule(cfg, self.args.epochs, num_images=len(images))
        schedule['train_cfg.val_interval'] = self.args.epochs
        return {**schedule, **evaluation()}


def print_results(runs: CriteriaRuns) -> None:
    """Print a row for each criterion."""
    pruned, tuned = runs.results('pruned'), runs.results('finetuned')
    shares = sorted({item['inputs']['share'] for item in pruned})
    tuned_at = sorted({(item['inputs']['share'], item['inputs']['epochs']) for item in tuned})
    header = ['criterion', *(f'-{share:.0%}' for share in shares),
              *(f'-{share:.0%}, {epochs} epochs' for share, epochs in tuned_at)]
    rows = []
    for name in CRITERIA:
        cells = [' / '.join(accuracy(select(pruned, criterion=name, share=share, compensate=value))
                            for value in (False, True)) for share in shares]
        cells += [accuracy(select(tuned, criterion=name, share=share, epochs=epochs))
                  for share, epochs in tuned_at]
        if set(cells) - {'-', '- / -'}:
            rows.append([name, *cells])
    print('mAP50 without / with compensation, and after fine-tuning; several seeds as mean '
          '(lowest to highest):\n')
    print('\n'.join(_markdown([header, *rows])))
    print_machine()


def accuracy(items: List[dict]) -> str:
    """The mean mAP50, and its range if there are several."""
    values = [item['mAP50'] for item in items]
    if not values:
        return '-'
    spread = f' ({min(values):.3f} to {max(values):.3f})' if len(values) > 1 else ''
    return f'{mean(values):.3f}{spread}'


def select(items: List[dict], **inputs: object) -> List[dict]:
    """Those results that have certain inputs."""
    return [item for item in items
            if all(item['inputs'][key] == value for key, value in inputs.items())]


# ---------------------------------------------------------------- time and memory
def cost_in_process(name: str, args: argparse.Namespace) -> dict:
    """Measure a criterion in a process of its own."""
    print(f'{name}: time and memory', file=sys.stderr, flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), '--child', name, '--large-config',
               args.large_config, '--calib-batches', str(args.calib_batches)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f'status {process.returncode}']
        raise UserError(f'measuring {name} failed: {lines[-1]}')
    return json.loads(process.stdout.splitlines()[-1])


def measure_cost(name: str, config: str, num_batches: int) -> Dict[str, object]:
    """Prune half of the MACs with a criterion; say how long and with how much memory.

    Args:
        name (str): The criterion.
        config (str): Config of the detector.
        num_batches (int): Batches of two images of noise with a box each.

    Returns:
        dict: ``name``, ``needs``, ``seconds`` of CPU time, ``peak_bytes`` above the memory
        before, and for a criterion that goes layer by layer ``sets``, their number, and
        ``seconds_a_unit``, which then come on top of the seconds.
    """
    cfg = load_config(config)
    model = _build(cfg)
    width, height = image_size(cfg)
    criterion = dict(type=f'mmgcp.{name}')
    needs = TASK_UTILS.build(criterion).needs
    batches = NoiseBatches(num_batches, height, width) if needs else None
    clock = Clock()
    before, _ = _memory('VmRSS'), _reset_peak()
    start = time.process_time()
    try:
        prune(model, criterion=criterion, target_flops=0.5, batches=batches,
              input_shape=(3, height, width), progress=clock)
        seconds = time.process_time() - start
    except Enough:
        seconds = clock.times[0] - start
    return dict(name=name, needs=needs, seconds=seconds, units=clock.units,
                seconds_a_unit=clock.seconds_a_unit, peak_bytes=_memory('VmHWM') - before)


class Enough(Exception):
    """Enough sets have been pruned."""


class Clock:
    """Takes the CPU time of each set, and raises Enough after some of them."""

    def __init__(self):
        self.times: List[float] = []
        self.units = 0

    def __call__(self, stage: str, done: int, steps: int) -> None:
        if stage == 'pruning layers':
            self.times.append(time.process_time())
            self.units = steps
            if TIMED_SETS <= done < steps:
                raise Enough

    @property
    def seconds_a_unit(self) -> Optional[float]:
        if not self.times:
            return None
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class NoiseBatches:
    """Batches of two images of noise, with a box each, in MMYOLO's form.

    Args:
        number (int): How many batches.
        height, width (int): Of the images, in pixels.
    """

    def __init__(self, number: int, height: int, width: int):
        self.number, self.height, self.width = number, height, width

    def __len__(self):
        return self.number

    def __iter__(self):
        for seed in range(self.number):
            generator = torch.Generator().manual_seed(seed)
            images = torch.rand(2, 3, self.height, self.width, generator=generator)
            boxes = torch.tensor([[0, 0, .1, .1, .6, .7], [1, 1, .3, .4, .9, .9]])
            boxes[:, 2:] *= torch.tensor([self.width, self.height] * 2)
            metas = [dict(batch_input_shape=(self.height, self.width))] * 2
            yield Batch(images, dict(bboxes_labels=boxes, img_metas=metas))


def print_costs(costs: List[dict], args: argparse.Namespace) -> None:
    """Print a row for each criterion."""
    rows = [[item['name'], item['needs'] or '-', f'{item["seconds"]:.1f}', time_of_units(item),
             f'{item["peak_bytes"] / BYTES:.0f}'] for item in costs]
    print(f'{Path(args.large_config).stem}, half of the MACs, {args.calib_batches} batches '
          'of 2 images where some are needed:\n')
    print('\n'.join(_markdown([['criterion', 'needs', 'CPU s', '+ CPU s a unit', 'MiB'], *rows])))
    print_machine()


def time_of_units(item: dict) -> str:
    """How long a channel unit takes, and how many there are."""
    return f'{item["units"]} x {item["seconds_a_unit"]:.1f}' if item['units'] else '-'


def print_machine() -> None:
    """Print what has been measured on."""
    machine = describe_machine(torch.get_num_threads())
    print('\n' + ', '.join(f'{key} {value}' for key, value in machine.items()))


if __name__ == '__main__':
    run_tool(main)

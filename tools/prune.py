# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Prune a detector: config and checkpoint in, config and checkpoint of a smaller one out."""
import argparse
import os
import os.path as osp
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import List, Optional, Sequence

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner.checkpoint import weights_to_cpu
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mmgcp
from mmgcp.attention import attention_aside, plain_config
from mmgcp.datasets.calibration import CalibrationBatches, ImagesOf, evaluate
from mmgcp.errors import PruningError, UserError
from mmgcp.nn.distributed import gather_over_ranks
from mmgcp.pipeline.finetuning import LayerFinetuning
from mmgcp.pruning import prune
from mmgcp.pruning.detector import make_pruned_config
from mmgcp.pruning.options import BUDGETS, PruneOptions, options_of_config
from mmgcp.pruning.report import summarize, write_report
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import CfgOptions, run_tool
from mmgcp.utils.config import build_detector, image_size, load_config
from mmgcp.utils.devices import add_device_arguments, started
from mmgcp.utils.options import add_arguments, given_options


def parse_args(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, or the given arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or a config of a package as mmyolo::...; '
                        'its prune_cfg may have layer groups and all other settings')
    parser.add_argument('checkpoint', nargs='?', help="default: the config's load_from")
    parser.add_argument('--work-dir', help='where to write; default: work_dirs/CONFIG_NAME-pruned')
    parser.add_argument('--dry-run', action='store_true', help='print the table, write nothing')
    parser.add_argument('--no-compensate', action='store_true',
                        help='make up for nothing: the pruned detector is exactly the original '
                        'without the removed channels')
    add_arguments(parser, PruneOptions)
    data = parser.add_argument_group('data')
    data.add_argument('--calib-batches', type=int, default=16, metavar='N',
                      help='batches of training images to compensate with, and for criteria that '
                      'need some; 0: use none; default: %(default)s')
    data.add_argument('--input-size', type=int, nargs=2, metavar=('WIDTH', 'HEIGHT'),
                      help='in pixels, for counting MACs; default: of the test images')
    data.add_argument('--sensitivity', action='store_true',
                      help='measure what each layer group costs on the validation data, and '
                      'spend the budget where it costs least')
    data.add_argument('--metric', help='validation metric for --sensitivity; default: the first '
                      'mAP')
    data.add_argument('--val-images', type=int, metavar='N',
                      help='validate --sensitivity on the first N images')
    data.add_argument('--cfg-options', nargs='+', action=CfgOptions,
                      help='settings of the config to override, as key=value')
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    if args.compensate and args.no_compensate:
        parser.error('--compensate and --no-compensate exclude each other')
    if args.calib_batches < 0:
        parser.error(f'--calib-batches must not be negative, but is {args.calib_batches}')
    return args


def pruning_options(cfg: Config, args: argparse.Namespace) -> dict:
    """The options of prune(): the config's prune_cfg, overridden by the command line."""
    options = options_of_config(cfg.get('prune_cfg', {}), args.config)
    given = given_options(args, PruneOptions)
    if any(name in given for name in BUDGETS):
        options.update(dict.fromkeys(BUDGETS))
    kind = given.pop('criterion', None)
    if kind:
        kind, configured = f'mmgcp.{kind}', options.get('criterion')
        if not isinstance(configured, dict) or configured.get('type', kind) != kind:
            configured = {}  # the options of another criterion
        options['criterion'] = dict(configured, type=kind)
    options.update(given)
    if args.no_compensate:
        options['compensate'] = False
    width, height = args.input_size or image_size(cfg)
    return dict(options, input_shape=(3, height, width), dry_run=args.dry_run)


@contextmanager
def progress_bar():
    """Yield a function that shows a stage, the steps done in it, and all its steps.

    Of several processes, only the first one shows anything.
    """
    columns = (TextColumn('{task.description:<20}'), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())
    console = Console(stderr=True, quiet=not is_main_process())
    with Progress(*columns, console=console) as bar:
        stages = {}

        def show(stage: str, done: int, steps: int) -> None:
            if stage == 'resuming':
                bar.console.print(f'resuming: {done} of {steps} channel units have been pruned '
                                  'before')
                return
            if stage not in stages:
                stages[stage] = bar.add_task(stage, total=steps)
            bar.update(stages[stage], completed=done, total=steps)

        yield show


def find_calibration(batches: Optional[CalibrationBatches], compensate) -> Optional[ImagesOf]:
    """Training images for compensation; None, with a warning, where there are none.

    Several processes decide together. Not all of them need have images.

    Raises:
        PruningError: There are none, but the kind of compensation needs some.
    """
    if not compensate or batches is None:
        return None
    found, error = False, None
    try:
        found = next(iter(batches), None) is not None
    except UserError as caught:
        error = caught
    found, reasons = zip(*gather_over_ranks((found, str(error or ''))))
    reason = max(reasons) or ('' if any(found) else 'there are no training images')
    if not reason:
        return ImagesOf(batches)
    if compensate in ('adapt-norms', 'reconstruct'):
        raise PruningError(reason) from error
    print(f'warning: {reason}; channels that do not emit a constant are compensated by what '
          'their shifts alone emit')
    return None


def make_finetuning(cfg: Config, settings: dict, progress) -> LayerFinetuning:
    """The training between units that prune_cfg asks for."""
    unknown = set(settings) - {'epochs', 'lr', 'every'}
    if unknown:
        raise PruningError(f'finetune of prune_cfg has unknown settings: {sorted(unknown)}')
    return LayerFinetuning(cfg, **settings, progress=progress)


def write_outputs(result, cfg: Config, package: str, meta: dict, folder: Path) -> List[str]:
    """Write everything, or nothing if anything fails; return the names of the files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as temporary:
        temporary = Path(temporary)
        make_pruned_config(cfg, package, result.changed_channels).dump(temporary / 'pruned.py')
        state = weights_to_cpu(result.model.state_dict())
        torch.save(dict(meta=meta, state_dict=state), temporary / 'pruned.pth')
        result.plan.save(temporary / 'plan.json')
        write_report(result, temporary)
        folder.mkdir(exist_ok=True)
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            os.replace(temporary / name, folder / name)
        if 'scores.png' not in names and (folder / 'scores.png').exists():
            (folder / 'scores.png').unlink()  # of an earlier run
    return names


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with started(args.device, args.launcher, args.local_rank) as device:
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Prune on a device, perhaps as one of several processes, of which the first one writes."""
    cfg = load_config(args.config, args.cfg_options)
    options = pruning_options(cfg, args)
    checkpoint = args.checkpoint or cfg.get('load_from')
    if not checkpoint:
        raise PruningError('there is no checkpoint: give one behind the config')
    model = build_detector(cfg)
    meta = load_strictly(model, checkpoint, args.config)
    model.to(device)
    package = type(model).__module__.split('.')[0]
    if args.calib_batches > 0:
        options['batches'] = CalibrationBatches(cfg, model, args.calib_batches)
    if not args.dry_run or args.sensitivity:  # which is measured with compensation
        options['calibration'] = find_calibration(options.get('batches'),
                                                  options.get('compensate', True))
    if args.sensitivity:
        options['evaluate'] = lambda model: evaluate(model, cfg, args.metric, args.val_images)[1]
    name = osp.splitext(osp.basename(args.config))[0]
    folder = Path(args.work_dir or osp.join('work_dirs', f'{name}-pruned'))
    if folder.exists() and not folder.is_dir():
        raise PruningError(f'{folder} is a file, not a folder to write to')
    unfinished = folder / 'unfinished.pth'  # of a run layer by layer that was interrupted
    with progress_bar() as progress, attention_aside(model, put_back=args.dry_run):
        if options.get('finetune') is not None:
            options['finetune'] = make_finetuning(cfg, options['finetune'], progress)
        result = prune(model, progress=progress, checkpoint_file=unfinished, **options)
    print(summarize(result))
    if args.dry_run:
        if result.plan.options.get('only_counts'):
            print('the numbers of channels are those of a real run, which then decides layer by '
                  'layer which channels they are')
        print('dry run: nothing has been written')
        return
    if not is_main_process():
        return

    meta = dict(dataset_meta=meta.get('dataset_meta', {}), mmgcp_version=mmgcp.__version__)
    names = write_outputs(result, plain_config(cfg), package, meta, folder)
    if 'only_counts' in result.plan.options and unfinished.exists():
        unfinished.unlink()
    print(f'written to {folder}: {", ".join(names)}')


if __name__ == '__main__':
    run_tool(main)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Prune a detector: config and checkpoint in, config and checkpoint of a smaller one out."""
import argparse
import os.path as osp
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import ContextManager, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.dist import is_main_process

from mmgcp.attention import attention_aside
from mmgcp.datasets.calibration import CalibrationBatches, evaluate
from mmgcp.errors import PruningError
from mmgcp.pipeline.accuracy import AccuracyRecord
from mmgcp.pipeline.progress import progress_bar
from mmgcp.pipeline.pruned_files import write_pruned
from mmgcp.pipeline.pruning_parts import find_images, make_finetuning, make_recovery
from mmgcp.pruning import check_request, prune, rehearse_pruning
from mmgcp.pruning.detector import registered_name
from mmgcp.pruning.options import BUDGETS, PruneOptions, options_of_config
from mmgcp.pruning.report import summarize
from mmgcp.pruning.rounding import with_default_multiple
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.checks import COUNT_OR_NONE
from mmgcp.utils.cli import CfgOptions, run_tool
from mmgcp.utils.config import build_detector, check_layout, image_size, load_config
from mmgcp.utils.devices import add_device_arguments, started
from mmgcp.utils.folders import work_dir
from mmgcp.utils.options import add_arguments, given_options

NEED_IMAGES = ('adapt-norms', 'reconstruct')


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
    parser.add_argument('--keep-hooks', action='store_true',
                        help='leave the config its DynamicSparsityHook, which would go on making '
                        'scale factors smaller when the pruned detector is trained; default: drop '
                        'it')
    add_arguments(parser, PruneOptions)
    data = parser.add_argument_group('data')
    data.add_argument('--calib-batches', type=int, default=16, metavar='N',
                      help='batches of training images to compensate with, and for criteria that '
                      'need some; 0: use none; default: %(default)s')
    data.add_argument('--recover-minutes', type=float, metavar='M',
                      help='train the pruned detector for so long to predict what the original '
                      'predicts on the training images, without their annotations; default: as in '
                      'prune_cfg (recover=dict(minutes=M)), or not at all')
    data.add_argument('--input-size', type=int, nargs=2, metavar=('WIDTH', 'HEIGHT'),
                      help='in pixels, for counting MACs; default: of the test images')
    data.add_argument('--sensitivity', action='store_true',
                      help='measure what each layer group costs on the validation data, and '
                      'spend the budget where it costs least')
    data.add_argument('--val-images', type=int, metavar='N',
                      help='measure the accuracy, before and after and for --sensitivity, on the '
                      'first N validation images; 0: do not measure it; default: before and after '
                      'on as many as fit into about a minute, --sensitivity on all')
    data.add_argument('--metric', help='which accuracy; default: the first mAP')
    data.add_argument('--cfg-options', nargs='+', action=CfgOptions,
                      help='settings of the config to override, as key=value')
    add_device_arguments(parser)
    args = parser.parse_args(arguments)
    if args.compensate and args.no_compensate:
        parser.error('--compensate and --no-compensate exclude each other')
    for name in ('calib_batches', 'val_images'):
        value, switch = getattr(args, name), f'--{name.replace("_", "-")}'
        if value is not None and not COUNT_OR_NONE.passes(value):
            parser.error(f'{switch} {COUNT_OR_NONE.text}, but is {value}')
    if args.val_images == 0 and (args.sensitivity or args.metric):
        parser.error(f'--val-images is 0: there is no accuracy for '
                     f'{"--sensitivity" if args.sensitivity else "--metric"}')
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
    if options.get('target_latency') is None and options.get('plan') is None:
        for name in ('runtime', 'latency_table'):
            if name in given:
                raise PruningError(f'--{name.replace("_", "-")} says something about '
                                   '--target-latency, which is not given')
    if args.no_compensate:
        options['compensate'] = False
    width, height = args.input_size or image_size(cfg)
    options = dict(options, input_shape=(3, height, width), dry_run=args.dry_run)
    check_request(**{key: value for key, value in options.items()
                     if key not in ('finetune', 'recover')})
    return options


def rehearse(args: argparse.Namespace, cfg: Config, model: nn.Module) -> None:
    """Find what is wrong with a request before there is the checkpoint that it is for.

    Args:
        args (argparse.Namespace): The command line.
        cfg (Config): The config.
        model (nn.Module): Its detector with any weights, on the CPU.
    """
    options = pruning_options(cfg, args)
    make_finetuning(cfg, options, None)
    make_recovery(cfg, model, options, args.recover_minutes)
    options.pop('recover', None)
    options.pop('finetune', None)
    if args.sensitivity or args.val_images or args.metric:
        evaluate(model, cfg, args.metric, 1)
    with attention_aside(model, put_back=True):
        with_default_multiple(partial(rehearse_pruning, model), options)


def results_folder(args: argparse.Namespace, checkpoint: str) -> ContextManager[Path]:
    """The folder to write to, taken by the first of several processes, unless nothing is written.

    Raises:
        UserError: It cannot be written to, or another run works in it.
    """
    name = osp.splitext(osp.basename(args.config))[0]
    folder = Path(args.work_dir or osp.join('work_dirs', f'{name}-pruned'))
    if args.dry_run or not is_main_process():
        return nullcontext(folder)
    return work_dir(folder, osp.getsize(checkpoint) if osp.isfile(checkpoint) else 0)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    with started(args.device, args.launcher, args.local_rank) as device:
        run(args, device)


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Prune on a device, perhaps as one of several processes, of which the first one writes."""
    cfg = load_config(args.config, args.cfg_options)
    options = pruning_options(cfg, args)
    if not args.dry_run:
        check_layout()
    checkpoint = args.checkpoint or cfg.get('load_from')
    if not checkpoint:
        raise PruningError('there is no checkpoint: give one behind the config')
    with results_folder(args, checkpoint) as folder:
        prune_into(folder, args, cfg, options, checkpoint, device)


def prune_into(folder: Path, args: argparse.Namespace, cfg: Config, options: dict,
               checkpoint: str, device: torch.device) -> None:
    """Prune the detector of a config and a checkpoint; write to a folder unless it is a dry run."""
    model = build_detector(cfg)
    meta = load_strictly(model, checkpoint, args.config)
    model.to(device)
    detector = registered_name(type(model))
    if args.calib_batches > 0:
        options['batches'] = CalibrationBatches(cfg, model, args.calib_batches)
    compensate, by_default = options.get('compensate', True), options.get('criterion') is None
    if compensate or by_default:
        images = find_images(options.get('batches'), compensate in NEED_IMAGES)
        options['calibration'] = images if compensate else None
        if images is None and by_default:
            options.pop('batches', None)  # of which there are none
    recovery = make_recovery(cfg, model, options, args.recover_minutes)
    options['recover'] = recovery
    if args.sensitivity:
        options['evaluate'] = lambda model: evaluate(model, cfg, args.metric, args.val_images)[1]
    unfinished = folder / 'unfinished.pth'  # of a run by layers or steps that was interrupted
    with progress_bar() as progress:
        options['finetune'] = make_finetuning(cfg, options, progress)
        if recovery is not None:
            recovery.progress = progress
        accuracy = AccuracyRecord(cfg, args.metric, args.val_images, progress)
        if not args.dry_run:
            accuracy.before(model)
        with attention_aside(model, put_back=args.dry_run):
            result = with_default_multiple(
                partial(prune, model, progress=progress, checkpoint_file=unfinished), options)
        accuracy.after(model)
        result.accuracy = accuracy.found
    print(summarize(result))
    if args.dry_run:
        print_dry_run(result, options)
    elif is_main_process():
        names = write_pruned(result, cfg, detector, meta, folder, args.keep_hooks)
        if 'finetune' in result.plan.options and unfinished.exists():
            unfinished.unlink()
        print(f'written to {folder}: {", ".join(names)}')


def print_dry_run(result, options: dict) -> None:
    """Say what a dry run tells, and what it does not."""
    if result.plan.options.get('only_counts'):
        print('the numbers of channels are those of a real run, which then decides layer by '
              'layer which channels they are')
    elif options.get('steps', 1) > 1 and options.get('plan') is None:
        print(f'this is what one step would remove: {options["steps"]} steps lead as far, but '
              'score the channels anew in each')
    print('dry run: nothing has been written')


if __name__ == '__main__':
    run_tool(main)

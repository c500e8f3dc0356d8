# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Train a detector: MMYOLO's tool, with mmgcp imported and the config checked first.

It takes the arguments of MMYOLO's tools/train.py; see --help. --resume without a checkpoint takes
the newest one in the work_dir that is whole; if there is none, the training starts as without it.
"""
import argparse
import copy
import os
import os.path as osp
from contextlib import nullcontext
from pathlib import Path
from typing import ContextManager

from mmengine.config import Config

import mmgcp  # noqa: F401
from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import UserError
from mmgcp.pipeline.rehearsal import rehearse_training
from mmgcp.pruning.detector import check_channels
from mmgcp.utils.checked_runner import CheckedRunner
from mmgcp.utils.checkpoint import read_checkpoint
from mmgcp.utils.checkpoint_files import newest_checkpoint, training_bytes
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import load_config, section
from mmgcp.utils.folders import work_dir
from mmgcp.utils.mmyolo_tools import load_mmyolo_tool


def check_files(cfg: Config) -> None:
    """Look for the files that a training begins with, before the runner does.

    Args:
        cfg (Config): The config of the training.

    Raises:
        UserError: The channel table of a pruned detector or the checkpoint is missing, or the
            checkpoint cannot be read.
    """
    check_channels(cfg.model)
    path = cfg.get('load_from')
    if path and '://' not in path and not osp.isfile(path):
        raise UserError(f'there is no checkpoint {path} to start from (load_from of the config)')
    if path:
        read_checkpoint(path)  # it is refused before the training has begun


def rehearse(cfg: Config, args: argparse.Namespace) -> int:
    """Find mistakes before the runner prints and writes anything.

    Args:
        cfg (Config): The config of the training.
        args (argparse.Namespace): The command line.

    Returns:
        int: Bytes that a checkpoint of the training has at least; 0 if nobody knows.

    Raises:
        UserError: Something is wrong.
    """
    if 'runner_type' in cfg:  # which may need other settings
        return 0
    cfg = copy.deepcopy(cfg)
    if args.resume:
        cfg.resume = True
    if args.amp:
        kind = section(cfg, 'optim_wrapper').get('type')
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise UserError(f'--amp needs the OptimWrapper, but optim_wrapper is a {kind}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
    return training_bytes(rehearse_training(cfg))


def find_work_dir(cfg: Config, args: argparse.Namespace) -> Path:
    """Return the folder that MMYOLO's tool will write to."""
    default = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    return Path(args.work_dir or cfg.get('work_dir') or default)


def choose_checkpoint(cfg: Config, args: argparse.Namespace, folder: Path) -> None:
    """Let ``args.resume`` name the checkpoint to resume from, whole, or be None.

    Raises:
        UserError: It is not whole, or those in the folder are not.
    """
    if args.resume not in (None, 'auto'):
        read_checkpoint(args.resume)
    elif args.resume == 'auto' or (cfg.get('resume') and not cfg.get('load_from')):
        try:
            args.resume = newest_checkpoint(folder)
        except UserError as error:
            raise UserError(f'{error}; without --resume the training starts from the '
                            'beginning') from None
        if args.resume is None:
            print(f'{folder} has no checkpoint to resume from: the training starts from the '
                  'beginning')


def main():
    tool = load_mmyolo_tool('train.py')
    args = tool.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    folder = find_work_dir(cfg, args)
    if args.resume is None:
        check_files(cfg)
    size = rehearse(cfg, args)
    with alone_in(folder, size):
        choose_checkpoint(cfg, args, folder)
        if not args.resume:
            check_files(cfg)
        tool.parse_args = lambda: args  # which it calls again
        mend_openmmlab()  # a checkpoint to resume from may be loaded before any class of mmgcp
        tool.Runner = CheckedRunner
        tool.main()


def alone_in(folder: Path, size: int) -> ContextManager:
    """Let the first of several processes take the folder for all of them.

    Raises:
        UserError: There is no space for so many bytes, or another run works in it.
    """
    ranks = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    rank = next((os.environ[name] for name in ranks if name in os.environ), '0')
    return work_dir(folder, size) if rank == '0' else nullcontext()


if __name__ == '__main__':
    run_tool(main)

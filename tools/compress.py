# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Compress a detector: train it, sparsify, prune and distil it, test each stage and compare."""
import argparse
import os.path as osp
import warnings
from pathlib import Path

from mmengine.config import DictAction

from mmgcp.pipeline import CompressOptions, compress
from mmgcp.pipeline.compress import format_table
from mmgcp.utils.cli import run_tool


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__ + ' Started again with the same arguments it goes on where it was.')
    parser.add_argument('config', help='config of the detector, a file or as mmyolo::...')
    parser.add_argument('checkpoint', nargs='?',
                        help='trained detector, a file or a URL; default: train it')
    parser.add_argument('--work-dir', help='default: work_dirs/CONFIG_NAME-compressed')
    parser.add_argument('--data', help="folder in PASCAL VOC's layout (JPEGImages, Annotations, "
                        "ImageSets/Main) to use instead of the config's data; default: the "
                        "config's")
    training = parser.add_argument_group(
        'training', 'The schedule of each stage is that of the config, fitted to its epochs.')
    training.add_argument('--epochs', type=int, help="of the first stage; default: the config's")
    training.add_argument('--sparse-epochs', type=int,
                          help="default: the config's sparse_epochs, or a sixth of those of the "
                          'first stage, but at least 50 and at most all')
    training.add_argument('--distill-epochs', type=int,
                          help="default: the config's distill_epochs, or likewise")
    training.add_argument('--lr', type=float,
                          help="learning rate of the first stage; default: the config's")
    training.add_argument('--sparse-lr', type=float, help="default: that of the first stage")
    training.add_argument('--distill-lr', type=float, help="default: that of the first stage")
    sparsity = parser.add_argument_group('sparsity')
    sparsity.add_argument('--sparsity-rate', type=float,
                          help="default: the config's sparsity_rate, or 1e-3 for the subgradient "
                          'and 2e-2 for the proximal penalty')
    sparsity.add_argument('--sparsity-penalty', choices=('subgradient', 'proximal'),
                          help='default: proximal for optimizers of the Adam kind, subgradient '
                          'for others')
    sparsity.add_argument('--sparsity-schedule', default=CompressOptions.sparsity_schedule,
                          help='type of the schedule of the rate; default: %(default)s')
    pruning = parser.add_argument_group('pruning')
    pruning.add_argument('--target-params', type=float,
                         help="share of the parameters to keep; default: the config's prune_cfg")
    pruning.add_argument('--target-flops', type=float,
                         help="share of the MACs to keep; default: the config's prune_cfg")
    pruning.add_argument('--prune-options', default='', metavar="'OPTIONS'",
                         help="more options of prune.py, as --prune-options='--round-to 8 "
                         "--sensitivity'; default: none")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={},
                        help='settings of the config to override, as key=value; default: none')
    return parser.parse_args()


def main():
    args = vars(parse_args())
    warnings.filterwarnings('ignore', category=FutureWarning)  # MMDetection's of torch
    name = osp.splitext(osp.basename(args['config']))[0]
    work_dir = Path(args.pop('work_dir') or osp.join('work_dirs', f'{name}-compressed'))
    rows = compress(
        CompressOptions(work_dir=work_dir, tools_dir=Path(__file__).resolve().parent, **args))
    print(f'\n{format_table(rows)}\n\nwritten to {work_dir}: summary.json, summary.md, '
          'detections.png')


if __name__ == '__main__':
    run_tool(main)

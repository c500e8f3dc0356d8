# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Compress a detector: train it, sparsify, prune and distil it, test each stage and compare."""
import argparse
import warnings
from pathlib import Path
from typing import Optional, Sequence

from mmgcp.pipeline import CompressOptions, compress
from mmgcp.pipeline.summary import format_summary
from mmgcp.utils.cli import run_tool
from mmgcp.utils.options import add_arguments, given_options


def parse_args(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, or the given arguments."""
    parser = argparse.ArgumentParser(
        description=f'{__doc__} Run again with the same arguments, it continues where it stopped. '
        'The schedule of each stage is that of the config, fitted to the number of epochs.')
    parser.add_argument('config', help='config of the detector, a file or as mmyolo::...')
    parser.add_argument('checkpoint', nargs='?',
                        help='trained detector, a file or a URL; default: train it')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/CONFIG_NAME-compressed')
    add_arguments(parser, CompressOptions)
    return parser.parse_args(arguments)


def main():
    args = parse_args()
    warnings.filterwarnings('ignore', category=FutureWarning)  # MMDetection's of torch
    work_dir = args.work_dir or Path('work_dirs') / f'{Path(args.config).stem}-compressed'
    rows = compress(CompressOptions(
        config=args.config, checkpoint=args.checkpoint, work_dir=work_dir,
        tools_dir=Path(__file__).resolve().parent, **given_options(args, CompressOptions)))
    print(f'\n{format_summary(rows)}\n\nwritten to {work_dir}: summary.json, summary.md, '
          'detections.png, curves.png')


if __name__ == '__main__':
    run_tool(main)

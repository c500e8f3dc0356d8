# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Compare detectors, originals and pruned ones: accuracy, size, memory and time, in one table.

The first one is what the others are compared with. The time is that of the network alone, fused
as tools/export.py does it, in PyTorch and, where it is installed, in onnxruntime.
"""
import argparse
from pathlib import Path
from typing import Optional, Sequence

import mmgcp  # noqa: F401  registers the detectors
from mmgcp.errors import UserError
from mmgcp.pipeline.compare_options import CompareOptions
from mmgcp.pipeline.comparison import compare, load_entries
from mmgcp.pipeline.comparison_report import FILES, format_comparison, write_comparison
from mmgcp.pipeline.progress import progress_bar
from mmgcp.utils.cli import CfgOptions, run_tool
from mmgcp.utils.folders import work_dir
from mmgcp.utils.options import add_arguments, given_options


def parse_args(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, or the given arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('detectors', nargs='+', metavar='CONFIG CHECKPOINT',
                        help='config, a file or as mmyolo::..., and checkpoint of each detector')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/comparison'),
                        help=f'where to write {", ".join(FILES)}; default: %(default)s')
    parser.add_argument('--names', nargs='+', metavar='NAME',
                        help='of the detectors; default: those of the checkpoints')
    add_arguments(parser, CompareOptions)
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions,
                        help='settings of all configs to override, as key=value')
    args = parser.parse_args(arguments)
    if len(args.detectors) % 2:
        parser.error('each detector is a config and a checkpoint, but there are '
                     f'{len(args.detectors)} files: {" ".join(args.detectors)}')
    number = len(args.detectors) // 2
    if args.names and not len(args.names) == len(set(args.names)) == number:
        parser.error(f'--names must be {number} different names, but are {" ".join(args.names)}')
    return args


def main() -> None:
    """Run the tool."""
    args = parse_args()
    options = CompareOptions(**given_options(args, CompareOptions))
    configs, checkpoints = args.detectors[::2], args.detectors[1::2]
    for checkpoint in checkpoints:  # before detectors are built
        if '://' not in checkpoint and not Path(checkpoint).is_file():
            raise UserError(f'there is no checkpoint {checkpoint}')
    with work_dir(args.work_dir) as folder:
        entries = load_entries(configs, checkpoints, args.names, args.cfg_options, options.data)
        with progress_bar() as progress:
            found = compare(entries, options, progress=progress)
        write_comparison(found, options, folder)
    print(f'{format_comparison(found, options)}\n\nwritten to {folder}: {", ".join(FILES)}')


if __name__ == '__main__':
    run_tool(main)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Prune a detector to many widths and depths, and see which plans pay before training any.

Each plan is scored right after compensation. The results are folders as those of tools/prune.py,
with a table and a picture. A run that was interrupted goes on when it is started again.
"""
import argparse
from pathlib import Path
from typing import Optional, Sequence

import mmgcp  # noqa: F401  registers the detectors
from mmgcp.pipeline.comparison import load_entries
from mmgcp.pipeline.pareto import try_plans
from mmgcp.pipeline.pareto_options import ParetoOptions
from mmgcp.pipeline.pareto_report import FILES, format_pareto, write_pareto
from mmgcp.pipeline.progress import progress_bar
from mmgcp.utils.cli import CfgOptions, run_tool
from mmgcp.utils.folders import work_dir
from mmgcp.utils.options import add_arguments, given_options


def parse_args(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, or the given arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config, a file or as mmyolo::...; its prune_cfg may have '
                        'layer groups, a criterion and so on')
    parser.add_argument('checkpoint', help='checkpoint of the detector')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/pareto'),
                        help=f'where to write {", ".join(FILES)} and a folder for each model; '
                        'default: %(default)s')
    add_arguments(parser, ParetoOptions)
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions,
                        help='settings of the config to override, as key=value')
    return parser.parse_args(arguments)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    options = ParetoOptions(**given_options(args, ParetoOptions))
    with work_dir(args.work_dir) as folder:
        entry, = load_entries([args.config], [args.checkpoint], None, args.cfg_options,
                              options.data)
        with progress_bar() as progress:
            found = try_plans(entry, options, folder, progress)
        write_pareto(found, options, folder)
    print(f'{format_pareto(found, options)}\n\nwritten to {folder}: {", ".join(FILES)}, and a '
          'folder for each model')


if __name__ == '__main__':
    run_tool(main)

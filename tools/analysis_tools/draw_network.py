# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Draw what pruning has left of a network, as a picture and as a web page of one file.

The layers are in the order in which they run, each as wide as it is, and was.
"""
import argparse
from pathlib import Path

import mmgcp  # noqa: F401  registers the detectors
from mmgcp.errors import UserError
from mmgcp.pipeline.network_drawing import FILES, draw_network
from mmgcp.utils.cli import run_tool


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('pruned', type=Path, help='folder that tools/prune.py has written')
    parser.add_argument('--out', type=Path,
                        help=f'existing folder for {" and ".join(FILES)}; default: the same')
    return parser.parse_args()


def main():
    args = parse_args()
    for folder in filter(None, (args.pruned, args.out)):
        if not folder.is_dir():
            raise UserError(f'there is no folder {folder}')
    print(f'written: {", ".join(map(str, draw_network(args.pruned, args.out)))}')


if __name__ == '__main__':
    run_tool(main)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Draw a small data set of simple shapes, in PASCAL VOC's layout, to try the package on."""
import argparse

from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset
from mmgcp.errors import UserError
from mmgcp.utils.cli import run_tool


def parse_args(args=None):
    defaults = DemoOptions()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', help='folder to make')
    parser.add_argument(
        '--num-train', type=int, default=defaults.num_train, help='images of train.txt')
    parser.add_argument('--num-val', type=int, default=defaults.num_val, help='of val.txt')
    parser.add_argument('--num-test', type=int, default=defaults.num_test, help='of test.txt')
    parser.add_argument(
        '--size', type=int, default=defaults.size, help='longer side of an image in pixels')
    parser.add_argument('--seed', type=int, default=defaults.seed)
    return parser.parse_args(args)


def main(args=None):
    args = parse_args(args)
    try:
        options = DemoOptions(args.num_train, args.num_val, args.num_test, args.size, args.seed)
        drawn = make_demo_dataset(args.out_dir, options)
    except ValueError as error:
        raise UserError(str(error)) from error
    state = 'Made' if drawn else 'Left as it was, already complete:'
    print(f'{state} {args.out_dir}')
    print(f'classes: {CLASSES}')


if __name__ == '__main__':
    run_tool(main)

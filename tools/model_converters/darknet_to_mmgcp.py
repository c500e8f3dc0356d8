# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Convert YOLOv4's cfg and weights of Darknet to a config and a checkpoint."""
import argparse
from pathlib import Path

import torch

from mmgcp.darknet import (
    DarknetError,
    channel_table,
    check_file,
    check_folder,
    checkpoint,
    class_names,
    complete_config,
    load_parameters,
    match_layers,
    read_cfg,
)
from mmgcp.utils.cli import replacing, run_tool


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('cfg', help='Darknet cfg of the network')
    parser.add_argument('weights', help='its weights; a partial file such as yolov4.conv.137 '
                        'gives a checkpoint of the first layers, to initialise from')
    parser.add_argument('out', help='checkpoint (.pth) to write; its config is put beside it')
    parser.add_argument('--names', help='names of the classes, one a line')
    return parser.parse_args()


def main():
    """Convert the files named on the command line."""
    args = parse_args()
    out = Path(args.out)
    if out.suffix != '.pth':
        raise DarknetError(f'the output {out} must end in .pth')
    check_folder(out)
    for what in ('cfg', 'weights', 'names'):
        if getattr(args, what) is not None:
            check_file(getattr(args, what), f'{what} file')
    convert(args, out)


def convert(args: argparse.Namespace, out: Path):
    """Convert the files and say what was found."""
    sections = _read_network(args.cfg)
    header, parameters = load_parameters(sections, args.weights)
    classes = class_names(sections[-1].integer('classes', '20'), args.names)
    config = complete_config(sections, classes)
    with replacing(out, out.with_suffix('.py')) as (checkpoint_file, config_file):
        torch.save(checkpoint(parameters, header, classes), checkpoint_file)
        config.dump(config_file)

    found = [i for i, layer in enumerate(match_layers(sections))
             if f'{layer.module}.conv.weight' in parameters
             or f'{layer.module}.weight' in parameters]
    num_convs = len(channel_table(sections))
    extent = 'all' if len(found) == num_convs else 'PARTIAL, the first'
    print(f'{args.weights}: {extent} {len(found)} of {num_convs} convolutions found '
          f'(Darknet layers 0 to {found[-1]} of {len(sections) - 1}).')
    print(f'Wrote {out} and {out.with_suffix(".py")}.')


def _read_network(path: str) -> list:
    sections = read_cfg(path)
    try:
        channel_table(sections)
    except DarknetError as error:
        raise DarknetError(f'{path}: {error}') from None
    return sections


if __name__ == '__main__':
    run_tool(main)

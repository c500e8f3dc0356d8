# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Convert a YOLOv4 of Darknet, pruned or not, to a config and a checkpoint.

The network may have any number of filters in any layer, as other programs prune
networks; then the config is like that of tools/prune.py and loads the checkpoint from
beside itself.
"""
import argparse
from pathlib import Path

from mmgcp.darknet import (
    DarknetError,
    check_file,
    check_folder,
    check_numbers,
    checkpoint,
    class_names,
    complete_config,
    is_pruned,
    load_parameters,
    match_layers,
    num_classes_of,
    read_cfg,
)
from mmgcp.utils.checkpoint_files import save_checkpoint
from mmgcp.utils.cli import replacing, run_tool
from mmgcp.utils.config import check_layout
from mmgcp.utils.config_text import write_config


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('cfg', help='Darknet cfg of the network')
    parser.add_argument('weights', help='its weights; a partial file such as yolov4.conv.137 '
                        'gives a checkpoint of the first layers, to initialise from, unless the '
                        'network has been pruned')
    parser.add_argument('out', help='checkpoint to write, ending in .pth; its config is put beside '
                        'it: pruned.pth and pruned.py, say')
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
    check_layout()
    convert(args, out)


def convert(args: argparse.Namespace, out: Path):
    """Convert the files and say what was found."""
    sections = _read_network(args.cfg)
    header, parameters = load_parameters(sections, args.weights)
    classes = class_names(num_classes_of(sections[-1]), args.names)
    config = complete_config(sections, classes, out.name)
    convs = [(index, layer) for index, layer in enumerate(match_layers(sections)) if layer.module]
    found = [index for index, layer in convs if f'{layer.module}.weight' in parameters
             or f'{layer.module}.conv.weight' in parameters]
    if is_pruned(config) and len(found) < len(convs):
        index, layer = convs[len(found)]
        raise DarknetError(f'{args.weights} ends before layer {index}, {layer}: the network has '
                           'been pruned, so its weights must be complete')
    with replacing(out, out.with_suffix('.py')) as (checkpoint_file, config_file):
        save_checkpoint(checkpoint(parameters, header, classes), checkpoint_file)
        write_config(config, config_file, [config.load_from] if is_pruned(config) else ())

    extent = 'all' if len(found) == len(convs) else 'PARTIAL, the first'
    print(f'{args.weights}: {extent} {len(found)} of {len(convs)} convolutions found '
          f'(Darknet layers 0 to {found[-1]} of {len(sections) - 1}).')
    if is_pruned(config):
        print('The network has been pruned, from a YOLOv4 with a widen_factor of at least '
              f'{config.model.backbone.widen_factor}.')
    print(f'Wrote {out} and {out.with_suffix(".py")}.')


def _read_network(path: str) -> list:
    sections = read_cfg(path)
    try:
        check_numbers(sections)
    except DarknetError as error:
        raise DarknetError(f'{path}: {error}') from None
    return sections


if __name__ == '__main__':
    run_tool(main)

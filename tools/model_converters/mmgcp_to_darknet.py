# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Convert a YOLOv4 of mmgcp, pruned or not, to the cfg, weights and names of Darknet."""
import argparse
from typing import Sequence

from mmgcp.darknet import (
    DarknetError,
    Header,
    check_folder,
    check_names,
    check_numbers,
    class_names,
    darknet_parameters,
    darknet_sections,
    format_cfg,
    input_size,
    load_detector,
    write_weights,
)
from mmgcp.utils.cli import replacing, run_tool
from mmgcp.utils.config import load_config


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the detector')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('out', help='OUT.cfg, OUT.weights and OUT.names are written')
    parser.add_argument('--input-size', type=int, nargs=2, metavar=('WIDTH', 'HEIGHT'),
                        help='input size in pixels; by default the config\'s')
    return parser.parse_args()


def main():
    """Convert the files named on the command line."""
    args = parse_args()
    check_folder(args.out)
    config = load_config(args.config)
    detector, meta = load_detector(config, args.checkpoint)
    sections = darknet_sections(detector, tuple(args.input_size or input_size(config)))
    check_numbers(sections)
    names = _class_names(meta, detector.bbox_head.num_classes)
    parameters = darknet_parameters(detector)

    header = Header(seen=_images_seen(meta))
    outputs = [f'{args.out}.{ending}' for ending in ('cfg', 'weights', 'names')]
    with replacing(*outputs) as (cfg_file, weights_file, names_file):
        cfg_file.write_text(format_cfg(sections), encoding='utf-8')
        write_weights(weights_file, header, parameters)
        names_file.write_text(''.join(f'{name}\n' for name in names), encoding='utf-8')
    print(f'Wrote {", ".join(outputs)}: {len(sections) - 1} layers, '
          f'{sum(parameter.size for parameter in parameters)} parameters.')


def _class_names(meta: dict, num_classes: int) -> Sequence[str]:
    dataset_meta = {key.lower(): value for key, value in meta.get('dataset_meta', {}).items()}
    names = dataset_meta.get('classes')
    names = class_names(num_classes) if names is None else check_names(names, 'the checkpoint')
    if len(names) != num_classes:
        raise DarknetError(f'the checkpoint names {len(names)} classes, but the model has '
                           f'{num_classes}')
    return names


def _images_seen(meta: dict) -> int:
    """The number of images that the checkpoint says it has been trained with in Darknet."""
    darknet = {} if meta.get('darknet') is None else meta['darknet']
    seen = darknet.get('seen', 0) if isinstance(darknet, dict) else None
    if type(seen) is not int or not 0 <= seen < 2**63:
        raise DarknetError('the meta of the checkpoint must have a number of images, as darknet '
                           f'and in it as seen, but has {str(darknet)[:60]!r}')
    return seen


if __name__ == '__main__':
    run_tool(main)

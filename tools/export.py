# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Export a detector, original or pruned, to a file of ONNX, OpenVINO or ncnn, and check it."""
import argparse
from typing import Optional, Sequence

import mmgcp  # noqa: F401
from mmgcp.deployment import ExportOptions, export_detector
from mmgcp.utils.cli import CfgOptions, run_tool
from mmgcp.utils.config import image_size
from mmgcp.utils.detectors import load_detector
from mmgcp.utils.options import add_arguments, given_options


def parse_args(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Parse the command line, or the given arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or a config of a package as mmyolo::...')
    parser.add_argument('checkpoint', help='checkpoint of the detector, pruned or not')
    parser.add_argument('out', help='file to write, such as detector.onnx')
    add_arguments(parser, ExportOptions)
    parser.add_argument('--input-size', type=int, nargs=2, metavar=('WIDTH', 'HEIGHT'),
                        help='of the images in pixels; default: of the test images')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions,
                        help='settings of the config to override, as key=value: with --nms '
                        'model.test_cfg.score_thr=0.25 model.test_cfg.nms_pre=1000, for example')
    return parser.parse_args(arguments)


def main() -> None:
    """Run the tool."""
    args = parse_args()
    options = ExportOptions(**given_options(args, ExportOptions))
    model, cfg, meta = load_detector(args.config, args.checkpoint, args.cfg_options)
    width, height = args.input_size or image_size(cfg)
    export_detector(model, cfg, args.out, (3, height, width), options, meta)


if __name__ == '__main__':
    run_tool(main)

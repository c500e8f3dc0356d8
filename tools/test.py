# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Test a detector: MMYOLO's tool, with mmgcp imported and config and checkpoint checked first.

It takes the arguments of MMYOLO's tools/test.py; see --help.
"""
import mmgcp  # noqa: F401
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import build_detector, load_config
from mmgcp.utils.mmyolo_tools import load_mmyolo_tool


def main():
    tool = load_mmyolo_tool('test.py')
    args = tool.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    # The runner only warns of weights that do not fit, and tests a model without them
    load_strictly(build_detector(cfg), args.checkpoint, args.config)
    tool.main()


if __name__ == '__main__':
    run_tool(main)

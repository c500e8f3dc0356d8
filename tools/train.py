# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Train a detector: MMYOLO's tool, with mmgcp imported and the config checked first.

It takes the arguments of MMYOLO's tools/train.py; see --help.
"""
import mmgcp  # noqa: F401
from mmgcp.compatibility import mend_openmmlab
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import load_config
from mmgcp.utils.mmyolo_tools import load_mmyolo_tool


def main():
    tool = load_mmyolo_tool('train.py')
    load_config(tool.parse_args().config)
    mend_openmmlab()  # a checkpoint to resume from may be loaded before any class of mmgcp
    tool.main()


if __name__ == '__main__':
    run_tool(main)

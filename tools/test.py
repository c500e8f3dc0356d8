# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Test a detector: MMYOLO's tool, with mmgcp imported and config and checkpoint checked first.

It takes the arguments of MMYOLO's tools/test.py; see --help. With --work-dir, it also writes the
metrics to metrics.json there.
"""
import json
from pathlib import Path

from mmengine.dist import master_only
from mmengine.logging import MessageHub

import mmgcp  # noqa: F401
from mmgcp.pipeline.rehearsal import rehearse_testing
from mmgcp.utils.checked_runner import CheckedRunner
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import replacing, run_tool
from mmgcp.utils.config import build_detector, load_config
from mmgcp.utils.mmyolo_tools import load_mmyolo_tool


@master_only
def write_metrics(path: Path) -> None:
    """Write what the runner that has just finished recorded of its test."""
    scalars = MessageHub.get_current_instance().log_scalars
    metrics = {name.partition('/')[2]: float(scalar.current())
               for name, scalar in scalars.items() if name.startswith('test/')}
    with replacing(path) as (temporary, ):
        temporary.write_text(json.dumps(metrics, indent=2) + '\n')


def main():
    tool = load_mmyolo_tool('test.py')
    args = tool.parse_args()
    cfg = load_config(args.config, args.cfg_options)
    # The runner would only warn of weights that do not fit, and test the model without them
    load_strictly(build_detector(cfg), args.checkpoint, args.config)
    if 'runner_type' not in cfg:  # which may need other settings
        rehearse_testing(cfg)
    tool.Runner = CheckedRunner
    tool.main()
    if args.work_dir:
        write_metrics(Path(args.work_dir) / 'metrics.json')


if __name__ == '__main__':
    run_tool(main)

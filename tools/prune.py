# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Prune a detector: config and checkpoint in, config and checkpoint of a smaller one out."""
import argparse
import inspect
import os
import os.path as osp
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config, DictAction

import mmgcp
from mmgcp.pruning import PruningError, prune
from mmgcp.pruning.pruned_config import make_pruned_config
from mmgcp.pruning.report import summarize, write_report
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.cli import run_tool
from mmgcp.utils.config import build_detector, load_config

OUTPUTS = ('pruned.py', 'pruned.pth', 'plan.json', 'report.json', 'report.md', 'channels.png',
           'scores.png')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the detector, with layer groups in prune_cfg')
    parser.add_argument('checkpoint', nargs='?', help="default: the config's load_from")
    parser.add_argument('--work-dir', help='where to write; default: work_dirs/CONFIG_NAME-pruned')
    parser.add_argument('--target-params', type=float, help='share of the parameters to keep')
    parser.add_argument('--target-flops', type=float, help='share of the operations to keep')
    parser.add_argument('--no-compensate', action='store_true',
                        help='do not fold the constants of removed channels into their consumers')
    parser.add_argument('--input-size', type=int, nargs=2, metavar=('WIDTH', 'HEIGHT'),
                        help="in pixels, for counting operations; default: the config's img_scale")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction,
                        help='settings of the config to override, as key=value')
    return parser.parse_args()


def pruning_options(cfg: Config, args: argparse.Namespace) -> dict:
    """The arguments of prune(): the config's prune_cfg, overridden by the command line."""
    if 'prune_cfg' not in cfg:
        raise PruningError(f'the config {args.config} has no prune_cfg; its layer groups must be '
                           'declared, as in configs/_base_/prune/yolov4_groups.py')
    options = cfg.prune_cfg.to_dict()
    unknown = set(options) - set(inspect.signature(prune).parameters)
    if unknown:
        raise PruningError(f'prune_cfg of {args.config} has unknown settings: {sorted(unknown)}')
    if args.target_params is not None or args.target_flops is not None:
        options.update(target_params=args.target_params, target_flops=args.target_flops)
    if args.no_compensate:
        options['compensate'] = False
    width, height = args.input_size or cfg.get('img_scale', (640, 640))
    return dict(options, input_shape=(3, height, width))


def write_outputs(result, cfg: Config, package: str, meta: dict, folder: Path) -> None:
    """Write everything, or nothing if anything fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f'.{folder.name}-') as temporary:
        temporary = Path(temporary)
        make_pruned_config(cfg, package, result.changed_channels).dump(temporary / 'pruned.py')
        torch.save(dict(meta=meta, state_dict=result.model.state_dict()), temporary / 'pruned.pth')
        result.plan.save(temporary / 'plan.json')
        write_report(result, temporary)
        folder.mkdir(exist_ok=True)
        for name in OUTPUTS:
            os.replace(temporary / name, folder / name)


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    options = pruning_options(cfg, args)
    checkpoint = args.checkpoint or cfg.get('load_from')
    if not checkpoint:
        raise PruningError('there is no checkpoint: give one behind the config')
    model = build_detector(cfg)
    meta = load_strictly(model, checkpoint, args.config)
    package = type(model).__module__.split('.')[0]
    result = prune(model, **options)

    name = osp.splitext(osp.basename(args.config))[0]
    folder = Path(args.work_dir or osp.join('work_dirs', f'{name}-pruned'))
    meta = dict(
        dataset_meta=meta.get('dataset_meta', {}), mmgcp_version=mmgcp.__version__)
    write_outputs(result, cfg, package, meta, folder)
    print(summarize(result))
    print(f'written to {folder}: {", ".join(OUTPUTS)}')


if __name__ == '__main__':
    run_tool(main)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Draw the sparse training of a run, or the scale factors of a checkpoint by layer group."""
import argparse
from pathlib import Path
from typing import Dict, List

import mmgcp  # noqa: F401  registers the detectors
from mmgcp.analysis.plots import check_picture, plot_score_histograms, plot_sparsity
from mmgcp.errors import UserError
from mmgcp.pipeline.training_log import log_files, read_log
from mmgcp.sparsity import select_scale_factors
from mmgcp.sparsity.channels import Channels
from mmgcp.utils.checks import NOT_NEGATIVE, check_value
from mmgcp.utils.cli import CfgOptions, replacing, run_tool
from mmgcp.utils.config import image_size
from mmgcp.utils.detectors import load_detector

SHARE = 'sparsity_near_zero'
COLUMNS = (SHARE, 'step', 'sparsity_rate', 'sparsity_loss')  # of a line about sparsity


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', help='work_dir of a training with DynamicSparsityHook, or the '
                        'config of the checkpoint')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint of the config')
    parser.add_argument('--out', help='PNG file to write; default: sparsity.png in the work_dir, '
                        'CHECKPOINT_NAME-gamma.png beside the checkpoint')
    parser.add_argument('--near-zero-thr', type=float, default=1e-2, help='mark it in the '
                        'histograms of a checkpoint; default: 1e-2')
    parser.add_argument('--cfg-options', nargs='+', action=CfgOptions,
                        help='settings of the config to override, as key=value')
    return parser.parse_args()


def read_scalars(work_dir: Path) -> List[dict]:
    """The lines about sparsity of a training, in the order of the iterations."""
    if not log_files(work_dir):
        raise UserError(f'{work_dir} has no vis_data/scalars.json: it is no work_dir of a training')
    rows = read_log(work_dir, _is_about_sparsity, 'a training with DynamicSparsityHook')
    if not rows:
        raise UserError(f'no training in {work_dir} has logged sparsity: DynamicSparsityHook was '
                        'not used, or ended before its first log')
    return rows


def _is_about_sparsity(row) -> bool:
    if not isinstance(row, dict) or SHARE in row and not all(
            type(row.get(name)) in (int, float) for name in (*COLUMNS, *_shares(row))):
        raise UserError
    return SHARE in row


def _shares(row: dict) -> List[str]:
    """The names of the shares of layer groups in a line."""
    return [name for name in row if name.startswith(f'{SHARE}/')]


def draw_run(work_dir: Path, out: Path) -> None:
    """Draw the curves of a training."""
    rows = read_scalars(work_dir)
    names = list(dict.fromkeys(name for row in rows for name in _shares(row)))
    near_zero = {'': [row[SHARE] for row in rows]}
    for name in names:
        near_zero[name[len(SHARE) + 1:]] = [row.get(name, float('nan')) for row in rows]
    with replacing(out) as (path, ):
        plot_sparsity([row['step'] for row in rows], near_zero,
                      [row['sparsity_rate'] for row in rows],
                      [row['sparsity_loss'] for row in rows], path)


def draw_checkpoint(args: argparse.Namespace, out: Path) -> None:
    """Draw the histograms of a checkpoint."""
    model, cfg, _ = load_detector(args.source, args.checkpoint, args.cfg_options)
    width, height = image_size(cfg)
    channels = Channels(select_scale_factors(
        model, groups='auto', input_shape=(3, height, width)).layers)
    magnitudes = channels.values().abs()
    scores: Dict[str, List[float]] = {
        name: magnitudes[mask].tolist() for name, mask in channels.groups.items()}
    with replacing(out) as (path, ):
        plot_score_histograms(scores, dict.fromkeys(scores, args.near_zero_thr),
                              'absolute BatchNorm scale factor', path)


def main():
    args = parse_args()
    source = Path(args.source)
    check_value('--near-zero-thr', args.near_zero_thr, NOT_NEGATIVE)
    if args.out:
        check_picture(args.out)
    if source.is_dir():
        if args.checkpoint:
            raise UserError(f'{source} is a folder: give either a work_dir, or a config and a '
                            'checkpoint')
        out = Path(args.out or source / 'sparsity.png')
        draw_run(source, out)
    elif args.checkpoint:
        checkpoint = Path(args.checkpoint)
        folder = Path() if '://' in args.checkpoint else checkpoint.parent
        out = Path(args.out or folder / f'{checkpoint.stem}-gamma.png')
        draw_checkpoint(args, out)
    elif source.is_file():
        raise UserError(f'{source} is a file: give the checkpoint of this config behind it, or the '
                        'work_dir of a training instead')
    else:
        raise UserError(f'there is no folder {source}; give the work_dir of a training, or a '
                        'config and a checkpoint')
    print(f'written: {out}')


if __name__ == '__main__':
    run_tool(main)

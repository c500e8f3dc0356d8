# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
r"""What is left of a trained detector after pruning: this project against its peers.

Each row is a way to prune the same detector to the same MACs or parameters. The pruned detector
is tested right away and after some epochs of training, in one plain loop that is the same for
all rows: the same data, seeds, optimizer and learning rate. Each number of epochs is a training
of its own. Where something is trained before pruning, such as a sparse training, there are as many
fewer epochs afterwards.

Calibration, which is what criteria, compensation and the gradients of peers see before any
training, is on the same images for all rows, too. Peers make up for nothing; "recalibrated BN"
estimates the statistics of their BatchNorms anew on these images.

A run that is finished is not run again; each start prints all that is there. For example:

  python benchmarks/peers.py mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py \
      yolov5n.pth --calibration coco128.json:coco128 --train voc_train.json:JPEGImages \
      --val voc_val.json:JPEGImages --size 416 --rows dense default 'tp-*-local' --seeds 0 1 2
"""
import argparse
from pathlib import Path

from peers_data import images
from peers_plot import Points, plot
from peers_pruning import AMOUNTS
from peers_rows import all_rows, read_options, read_variant, select
from peers_runs import CALIBRATION_BATCH, PeerRuns, compare
from peers_tables import print_tables
from peers_training import LR

from mmgcp.errors import UserError
from mmgcp.pipeline.stage_configs import SPARSITY_RATES
from mmgcp.utils.cli import CfgOptions, run_tool


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the trained detector')
    parser.add_argument('checkpoint')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/peers/CONFIG_NAME')
    add_data_arguments(parser.add_argument_group('data'))
    rows = parser.add_argument_group('what is compared')
    rows.add_argument('--rows', nargs='+', default=['*'], metavar='NAME',
                      help="names or patterns, such as 'tp-*'; default: all; an unknown name "
                      'lists them')
    rows.add_argument('--variant', action='append', default=[], type=read_variant,
                      metavar="NAME='KEY=VALUE ...'",
                      help='one more row of this project, with options of prune() such as '
                      'criterion.type=mmgcp.L1Norm allocation=uniform; may be repeated')
    rows.add_argument('--prune-options', default={}, type=read_options, metavar="'KEY=VALUE ...'",
                      help='options of prune() for all rows of this project')
    rows.add_argument('--remove', type=float, nargs='*', default=[0.3, 0.5],
                      help='shares to remove; default: 0.3 0.5')
    rows.add_argument('--also-remove', type=float, nargs='*', default=[],
                      help='more of them, without training afterwards')
    rows.add_argument('--of', choices=sorted(AMOUNTS), default='MACs',
                      help='what these two are shares of; default: %(default)s')
    training = parser.add_argument_group('training')
    training.add_argument('--epochs', type=int, nargs='*', default=[3, 10],
                          help='lengths of trainings; default: 3 10; none: no training')
    training.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2],
                          help='default: 0 1 2')
    training.add_argument('--lr', type=float, help=f"of AdamW; default: {LR:g}")
    training.add_argument('--first-epochs', type=int, default=3,
                          help='those of the epochs that are before pruning, where something is '
                          'trained before; default: 3')
    training.add_argument('--sparsity-rate', type=float,
                          default=SPARSITY_RATES['proximal'],
                          help='default: %(default)s, which tools/compress.py takes with AdamW')
    output = parser.add_argument_group('output')
    output.add_argument('--report', action='store_true', help='only print what is there')
    output.add_argument('--plot', type=Path, metavar='FILE.png', help='accuracy against MACs')
    output.add_argument('--points', type=Path, metavar='FILE.json',
                        help='what has been plotted so far, such as on other machines: that is '
                        'plotted, too, and what is measured here is written into it')
    return parser.parse_args()


def add_data_arguments(group) -> None:
    """Add what says where the images are, and how large."""
    for name, number, text in (
            ('calibration', '+', 'for criteria, compensation and gradients'),
            ('train', '+', 'to train with'), ('val', None, 'to test on')):
        group.add_argument(f'--{name}', type=images, nargs=number, metavar='ANNOTATIONS:FOLDER',
                           help=f"images {text}, annotated in COCO's format with the detector's "
                           "classes; default: the config's")
    group.add_argument('--size', type=int, help='width and height of the images to test on, in '
                       "pixels; MACs are counted for them, too; default: the config's width")
    group.add_argument('--train-size', type=int,
                       help='of the images to calibrate and train with; default: --size')
    group.add_argument('--augment', action='store_true',
                       help="load them with the config's pipeline for training, such as mosaics; "
                       'by default they are resized as in tests, and flipped at random')
    group.add_argument('--batch-size', type=int, default=16, help='of training; default: 16')
    group.add_argument('--calib-batches', type=int, default=16,
                       help=f'of {CALIBRATION_BATCH} images; default: 16')
    group.add_argument('--cfg-options', nargs='+', action=CfgOptions, default={},
                       help='settings of the config to override, as key=value')


def main():
    args = parse_args()
    if any(not 0 < share < 1 for share in (*args.remove, *args.also_remove)):
        raise UserError('shares to remove must be in (0, 1)')
    args.epochs = sorted(set(args.epochs))
    rows = select(all_rows(args.prune_options, dict(args.variant)), args.rows)
    folder = args.work_dir or Path('work_dirs') / 'peers' / Path(args.config).stem
    runs = PeerRuns(folder, args)
    if not args.report:
        compare(runs, rows)
    print_tables(runs, rows)
    if args.plot or args.points:
        points = Points(runs, rows, args.points)
    if args.plot:
        plot(points, max(args.epochs, default=0), args.plot)


if __name__ == '__main__':
    run_tool(main)

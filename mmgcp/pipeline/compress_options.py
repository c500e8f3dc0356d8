# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The options of compressing a detector in all stages."""
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Optional

from mmgcp.pruning.options import KEEP_SHARE
from mmgcp.sparsity.hook import PENALTIES, RATE
from mmgcp.utils.checks import COUNT, COUNT_OR_NONE, NAME, PATH, POSITIVE, one_of
from mmgcp.utils.cli import CfgOptions
from mmgcp.utils.options import check_options, option

TRAINING, SPARSITY, PRUNING = 'training', 'sparsity', 'pruning'


@dataclass
class CompressOptions:
    """Options of :func:`compress`.

    Raises:
        UserError: A value is not allowed.
    """
    config: str = option(help='config of the detector, a file or as ``mmyolo::…``')
    work_dir: Path = option(check=PATH, help='where everything is written')
    tools_dir: Path = option(help='folder with train.py, test.py and prune.py')
    checkpoint: Optional[str] = option(
        None, check=PATH, help='the trained detector, a file or a URL', default_help='train it')
    data: Optional[str] = option(
        None, check=PATH, cli={}, default_help="the config's",
        help="folder in PASCAL VOC's layout (JPEGImages, Annotations, ImageSets/Main) that takes "
        "the place of the config's data")
    epochs: Optional[int] = option(
        None, check=COUNT, cli=dict(group=TRAINING, type=int), default_help="the config's",
        help='epochs of the first stage')
    sparse_epochs: Optional[int] = option(
        None, check=COUNT_OR_NONE, cli=dict(group=TRAINING, type=int),
        default_help="the config's sparse_epochs, or a sixth of the first stage's, but at least "
        '50 and at most all', help='epochs of sparse training; with 0 there is none')
    distill_epochs: Optional[int] = option(
        None, check=COUNT, cli=dict(group=TRAINING, type=int),
        default_help="the config's distill_epochs, or as for sparse training",
        help='epochs of distillation')
    lr: Optional[float] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=float), default_help="the config's",
        help='learning rate of the first stage; absolute rates of the schedulers are scaled '
        'with it')
    sparse_lr: Optional[float] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=float),
        default_help="the first stage's", help='learning rate of sparse training')
    distill_lr: Optional[float] = option(
        None, check=POSITIVE, cli=dict(group=TRAINING, type=float),
        default_help="a tenth of the first stage's", help='learning rate of distillation')
    sparsity_rate: Optional[float] = option(
        None, check=RATE, cli=dict(group=SPARSITY, type=float),
        default_help="the config's sparsity_rate, or 1e-3 for the subgradient and 2e-2 for the "
        'proximal penalty', help='factor of the sparsity penalty')
    sparsity_penalty: Optional[str] = option(
        None, check=one_of(*PENALTIES), cli=dict(group=SPARSITY, choices=PENALTIES),
        default_help='proximal for Adam and its variants, subgradient for other optimizers',
        help='how the penalty is applied, subgradient or proximal')
    sparsity_schedule: str = option(
        'two_phase', check=NAME, cli=dict(group=SPARSITY),
        help='type of the schedule of the sparsity rate')
    target_params: Optional[float] = option(
        None, check=KEEP_SHARE, cli=dict(group=PRUNING, type=float),
        default_help="the config's prune_cfg", help='share of the parameters to keep')
    target_flops: Optional[float] = option(
        None, check=KEEP_SHARE, cli=dict(group=PRUNING, type=float),
        default_help="the config's prune_cfg", help='share of the MACs to keep')
    prune_options: str = option(
        '', cli=dict(group=PRUNING, metavar="'OPTIONS'"), default_help='none',
        help="more options of prune.py, as in --prune-options='--round-to 8 --sensitivity'; where "
        'neither they nor the config have a criterion, it is BestOf after sparse training')
    cfg_options: Dict[str, object] = option(
        factory=dict, cli=dict(nargs='+', action=CfgOptions), default_help='none',
        help='settings of the config to override, as key=value')

    def __post_init__(self):
        check_options(self)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The options of trying plans of many widths and depths."""
from dataclasses import dataclass
from typing import Optional, Sequence

from mmgcp.deployment.timing import RUNTIMES
from mmgcp.errors import UserError
from mmgcp.pruning.blocks.scores import BLOCK_CRITERIA, COMPENSATED
from mmgcp.pruning.options import KEEP_SHARE
from mmgcp.utils.checks import (
    BOOLEAN,
    COUNT,
    COUNT_OR_NONE,
    MAX_SIDE,
    NAME,
    PATH,
    Check,
    list_of,
    number_in,
    one_of,
)
from mmgcp.utils.options import check_options, option

SIDE = number_in(32, MAX_SIDE, integer=True)
WIDTH = Check(lambda value: SIDE.passes(value) and value % 32 == 0, 'must be a multiple of 32')


@dataclass
class ParetoOptions:
    """Which plans are tried, and on what; each option is described by its help."""
    shares: Sequence[float] = option(
        (0.9, 0.8, 0.7, 0.6), check=list_of(KEEP_SHARE, 'must be a list of shares to keep'),
        cli=dict(type=float, nargs='+', metavar='SHARE'), default_help='0.9 0.8 0.7 0.6',
        help='Shares of the MACs to keep, or of the time with runtime.')
    depths: Sequence[int] = option(
        (0, 1, 2), check=list_of(COUNT_OR_NONE, 'must be a list of numbers of blocks'),
        cli=dict(type=int, nargs='+', metavar='N'), default_help='0 1 2',
        help='Numbers of blocks to remove before; each is also tried with all channels.')
    image_widths: Sequence[int] = option(
        (), check=list_of(WIDTH, 'must be a list of multiples of 32', empty=True),
        cli=dict(type=int, nargs='+', metavar='PIXELS'), default_help="the test images' alone",
        help='Widths of images that each model is tested on besides.')
    plain_blocks: bool = option(
        False, check=BOOLEAN, cli=dict(action='store_true'),
        help='Whether blocks without a shortcut may be chosen, too.')
    block_criterion: str = option(
        COMPENSATED, check=one_of(*BLOCK_CRITERIA), cli=dict(choices=BLOCK_CRITERIA),
        help='How blocks are chosen.')
    runtime: Optional[str] = option(
        None, check=one_of(None, *RUNTIMES), cli=dict(choices=RUNTIMES), default_help='MACs',
        help='Program in which times on one thread of this machine take the place of MACs.')
    data: Optional[str] = option(
        None, check=PATH, cli={}, default_help="the config's",
        help="Folder in PASCAL VOC's layout that takes the place of the config's data.")
    calib_batches: int = option(
        8, check=COUNT, cli=dict(type=int, metavar='N'),
        help='Batches of training images to score and compensate with.')
    val_images: int = option(
        100, check=COUNT_OR_NONE, cli=dict(type=int, metavar='N'),
        help='Number of validation images, the first ones; 0: the loss on the training images '
        'counts instead of the accuracy.')
    metric: Optional[str] = option(
        None, check=NAME, cli={}, default_help='the first mAP', help='Which accuracy.')

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: One is not allowed, or does not go with another one.
        """
        check_options(self)
        if self.image_widths and not self.val_images:
            raise UserError('image_widths are for a test on validation images, of which '
                            'val_images leaves none')

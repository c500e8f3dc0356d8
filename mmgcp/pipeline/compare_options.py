# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The options of comparing detectors."""
from dataclasses import dataclass
from typing import Optional

from mmgcp.utils.checks import BOOLEAN, COUNT, COUNT_OR_NONE, NAME, PATH, number_in, one_of
from mmgcp.utils.options import check_options, option

INT8 = 'int8'


@dataclass
class CompareOptions:
    """How detectors are compared; each option is described by its help."""
    data: Optional[str] = option(
        None, check=PATH, cli={}, default_help="the config's",
        help="Folder in PASCAL VOC's layout that takes the place of the data of all configs.")
    val_images: int = option(
        100, check=COUNT_OR_NONE, cli=dict(type=int, metavar='N'),
        help='Number of validation images, the first ones; 0: do not measure the accuracy.')
    metric: Optional[str] = option(
        None, check=NAME, cli={}, default_help='the first mAP', help='Which accuracy.')
    rounds: int = option(
        20, check=number_in(1, 10000, integer=True), cli=dict(type=int, metavar='N'),
        help='Number of rounds, in each of which each detector reads one image.')
    threads: int = option(
        1, check=number_in(1, 1024, integer=True), cli=dict(type=int, metavar='N'),
        help='Number of threads.')
    int8: bool = option(
        False, check=BOOLEAN, cli=dict(action='store_true', group=INT8),
        help='Compare them with 8-bit integers, too.')
    weight_bits: int = option(
        8, check=one_of(7, 8), cli=dict(type=int, choices=[7, 8], group=INT8),
        help='Bits of weights: with 8, sums overflow on x86 CPUs without VNNI.')
    calib_batches: int = option(
        8, check=COUNT, cli=dict(type=int, metavar='N', group=INT8),
        help='Batches of training images from which the ranges of the integers are found.')

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: One is not allowed.
        """
        check_options(self)

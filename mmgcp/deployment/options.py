# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The options of exporting a detector."""
from dataclasses import dataclass
from typing import Optional

from mmgcp.errors import UserError
from mmgcp.utils.checks import BOOLEAN, COUNT, COUNT_OR_NONE, number_in, one_of
from mmgcp.utils.options import check_options, option

SUFFIXES = dict(onnx='.onnx', openvino='.xml', ncnn='.param')


@dataclass
class ExportOptions:
    """How a detector is exported; each option is described by its help."""
    format: str = option(
        'onnx', check=one_of(*SUFFIXES), cli=dict(choices=list(SUFFIXES)),
        help='Kind of file, whose name has to end in .onnx, .xml (OpenVINO) or .param (ncnn).')
    nms: bool = option(
        False, check=BOOLEAN, cli=dict(action='store_true'),
        help='Decode the predictions and choose the best by test_cfg in the file, whose outputs '
        'are boxes, scores and labels; otherwise they are what the head emits.')
    dynamic: str = option(
        'none', check=one_of('none', 'batch', 'size', 'both'),
        cli=dict(choices=['none', 'batch', 'size', 'both']),
        help='What of the shape of the images is left open.')
    batch: int = option(
        1, check=COUNT, cli=dict(type=int, metavar='N'),
        help='Images in a batch, where that is not left open.')
    opset: int = option(
        13, check=number_in(11, 17, integer=True),
        cli=dict(type=int, metavar='N'), help="Version of ONNX's set of operations.")
    tolerance: float = option(
        1e-4, check=number_in(0, 1, open_low=True),
        cli=dict(type=float, metavar='T'),
        help='How far the file may be from PyTorch, relative to the largest coordinate of a box, '
        'or to the largest value of a map if above 1; if it is farther, it is not kept.')
    int8: bool = option(
        False, check=BOOLEAN, cli=dict(action='store_true', group='int8'),
        help='Write a second file, with -int8 in its name, that computes with 8-bit integers.')
    weight_bits: int = option(
        8, check=one_of(7, 8), cli=dict(type=int, choices=[7, 8], group='int8'),
        help='Bits of weights: with 8, sums overflow on x86 CPUs without VNNI.')
    calib_batches: int = option(
        8, check=COUNT, cli=dict(type=int, metavar='N', group='int8'),
        help='Batches of training images from which the ranges of the integers are found.')
    val_images: Optional[int] = option(
        None, check=COUNT_OR_NONE, default_help='100 with --int8, else 0',
        cli=dict(type=int, metavar='N', group='int8'),
        help='Measure the accuracy of the detector and of each file on the first N validation '
        'images.')

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: One is not allowed, or does not go with another one.
        """
        check_options(self)
        if self.format != 'onnx' and self.int8:
            raise UserError(f'int8 goes with ONNX files only, not with {self.format}')
        if self.format == 'ncnn' and self.nms:
            raise UserError('ncnn has no NMS: export the raw outputs')
        if self.format == 'ncnn' and (self.dynamic != 'none' or self.batch != 1):
            raise UserError('ncnn files take one image of one size: dynamic and batch do not go '
                            'with them')

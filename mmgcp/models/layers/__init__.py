# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .yolov4_bricks import CSPDarknetLayer, SPPBlock, alternating_convs

__all__ = ['CSPDarknetLayer', 'SPPBlock', 'alternating_convs']

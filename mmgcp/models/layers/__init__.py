# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .yolov4_bricks import CSPDarknetLayer, DefaultInitMixin, SPPBlock, alternating_convs

__all__ = ['CSPDarknetLayer', 'DefaultInitMixin', 'SPPBlock', 'alternating_convs']

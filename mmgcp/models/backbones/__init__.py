# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .yolov4_csp_darknet import YOLOv4CSPDarknet

__all__ = ['YOLOv4CSPDarknet']

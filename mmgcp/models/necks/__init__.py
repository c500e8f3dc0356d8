# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .finer_level import FinerLevel, YOLOv4FinerPAFPN, YOLOv5FinerPAFPN
from .yolov4_pafpn import YOLOv4PAFPN

__all__ = ['FinerLevel', 'YOLOv4FinerPAFPN', 'YOLOv4PAFPN', 'YOLOv5FinerPAFPN']

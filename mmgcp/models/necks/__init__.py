# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .yolov4_pafpn import YOLOv4PAFPN

__all__ = ['YOLOv4PAFPN']

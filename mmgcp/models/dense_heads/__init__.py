# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .yolov4_head import YOLOv4Head
from .yolov4_head_module import YOLOv4HeadModule

__all__ = ['YOLOv4Head', 'YOLOv4HeadModule']

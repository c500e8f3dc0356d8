# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .yolov4_bbox_coder import YOLOv4BBoxCoder

__all__ = ['YOLOv4BBoxCoder']

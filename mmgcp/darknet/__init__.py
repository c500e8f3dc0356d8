# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Conversion of YOLOv4 from and to the files of Darknet (cfg, weights, names)."""
from .cfg import DarknetError, Section, first_line, format_cfg, parse_cfg, read_cfg
from .files import check_file, check_folder
from .from_darknet import (
    check_numbers,
    checkpoint,
    complete_config,
    is_pruned,
    load_parameters,
    model_config,
    num_classes_of,
)
from .layers import yolov4_layers
from .matching import channel_table, match_layers
from .names import check_names, class_names, read_names
from .to_darknet import check_model, darknet_parameters, darknet_sections, input_size, load_detector
from .weights import Header, read_weights, write_weights

__all__ = [
    'DarknetError', 'Header', 'Section', 'channel_table', 'check_file', 'check_folder',
    'check_model', 'check_names', 'check_numbers', 'checkpoint', 'class_names', 'complete_config',
    'darknet_parameters', 'darknet_sections', 'first_line', 'format_cfg', 'input_size',
    'is_pruned', 'load_detector', 'load_parameters', 'match_layers', 'model_config',
    'num_classes_of', 'parse_cfg', 'read_cfg', 'read_names', 'read_weights', 'write_weights',
    'yolov4_layers'
]

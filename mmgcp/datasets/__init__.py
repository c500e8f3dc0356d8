# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .voc import VOCError, VOCInfo, check_voc, choose_splits, find_voc_root
from .voc_dataset import VOCFormatDataset

__all__ = [
    'VOCError', 'VOCFormatDataset', 'VOCInfo', 'check_voc', 'choose_splits', 'find_voc_root'
]

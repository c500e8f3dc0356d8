# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .criterion import AuxiliaryCriterion
from .targets import Positives, PriorBoxes, find_positives, number_of_classes, read_ground_truth

__all__ = [
    'AuxiliaryCriterion', 'Positives', 'PriorBoxes', 'find_positives', 'number_of_classes',
    'read_ground_truth'
]

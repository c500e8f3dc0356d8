# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .criterion import AuxiliaryCriterion
from .networks import LocalizationNetwork, PresenceNetwork
from .positives import Positives, find_positives, read_ground_truth
from .priors import PriorBoxes, number_of_classes

__all__ = [
    'AuxiliaryCriterion', 'LocalizationNetwork', 'Positives', 'PresenceNetwork', 'PriorBoxes',
    'find_positives', 'number_of_classes', 'read_ground_truth'
]

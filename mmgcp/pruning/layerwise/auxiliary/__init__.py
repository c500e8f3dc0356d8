# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .contextual_roi import contextual_roi_align, enclosing_boxes
from .criterion import AuxiliaryCriterion
from .networks import LocalizationNetwork, PresenceNetwork
from .positives import Positives, find_positives, read_ground_truth
from .priors import PriorBoxes, number_of_classes
from .settings import AuxiliarySettings

__all__ = [
    'AuxiliaryCriterion', 'AuxiliarySettings', 'LocalizationNetwork', 'Positives',
    'PresenceNetwork', 'PriorBoxes', 'contextual_roi_align', 'enclosing_boxes', 'find_positives',
    'number_of_classes', 'read_ground_truth'
]

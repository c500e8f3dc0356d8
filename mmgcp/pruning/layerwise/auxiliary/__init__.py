# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .auxiliary_criterion import AuxiliaryCriterion
from .contextual_roi import contextual_roi_align, enclosing_boxes
from .networks import LocalizationNetwork, PresenceNetwork
from .positives import Positives, find_positives, read_ground_truth

__all__ = [
    'AuxiliaryCriterion', 'LocalizationNetwork', 'Positives', 'PresenceNetwork',
    'contextual_roi_align', 'enclosing_boxes', 'find_positives', 'read_ground_truth'
]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .contributions import Entries, contributions, draw_entries
from .criterion import ThiNet
from .gram import least_squares_factors, removal_ranks

__all__ = [
    'Entries', 'ThiNet', 'contributions', 'draw_entries', 'least_squares_factors', 'removal_ranks'
]

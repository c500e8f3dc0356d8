# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .detector import SpatialPruner, find_inference
from .inference import ATTRIBUTE, SpatialInference
from .settings import SpatialSettings

__all__ = ['ATTRIBUTE', 'SpatialInference', 'SpatialPruner', 'SpatialSettings', 'find_inference']

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Layers of any model, and running it: what every method of this package is made of."""

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Tools for the layers of any model and for running it, which all methods build on."""

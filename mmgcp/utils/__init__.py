# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Helpers for files, configs, command lines and the process; they know nothing of layers."""

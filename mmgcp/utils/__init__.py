# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Files, configs and processes: what knows no layers."""

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from pruning_fixtures import scope  # noqa: F401

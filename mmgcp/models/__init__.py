# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from .backbones import *  # noqa: F403
from .dense_heads import *  # noqa: F403
from .necks import *  # noqa: F403
from .task_modules import *  # noqa: F403

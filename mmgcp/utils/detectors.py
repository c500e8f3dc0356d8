# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors as tools are given them: a config and a checkpoint."""
import copy
from typing import NamedTuple, Optional

import torch.nn as nn
from mmengine.config import Config

from .checkpoint import load_strictly
from .config import build_detector, load_config


class Loaded(NamedTuple):
    """A detector in eval mode on the CPU, its config, and the ``meta`` of its checkpoint."""
    model: nn.Module
    cfg: Config
    meta: dict


def load_detector(config: str, checkpoint: str, cfg_options: Optional[dict] = None) -> Loaded:
    """Build the detector of a config, and load the weights of a checkpoint, which all must fit.

    Args:
        config (str): See :func:`mmgcp.utils.config.load_config`.
        checkpoint (str): File or URL.
        cfg_options (dict, optional): Settings of the config to override, by dotted name.

    Returns:
        Loaded: The detector.

    Raises:
        UserError: One of them cannot be read, or they do not fit each other.
    """
    cfg = load_config(config, copy.deepcopy(cfg_options))
    model = build_detector(cfg)
    meta = load_strictly(model, checkpoint, config)
    return Loaded(model.eval(), cfg, meta)

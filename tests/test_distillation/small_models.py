# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Models to distil, with the weights that training starts from."""
import copy

import torch
from mmengine.config import ConfigDict

from mmgcp.registry import MODELS

GROUPS = [
    dict(name='backbone', weight=1e3, layers=['backbone.stage1', 'backbone.stage4']),
    dict(name='head', weight=10., layers=['bbox_head.head_module.convs_bridge.0']),
]


def build(config, seed=0):
    torch.manual_seed(seed)
    model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    model.init_weights()
    return model

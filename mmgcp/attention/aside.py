# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning detectors that were trained with attention."""
import functools
import inspect
from typing import Callable

import torch.nn as nn

from mmgcp.pruning.masking import Snapshot

from .modules import forget_aside, set_aside


def without_attention(prune: Callable) -> Callable:
    """Let a function that prunes models see detectors without the attention of training.

    The attention is set aside meanwhile, where :class:`mmgcp.pruning.scores.CPSCA` finds
    it, and dropped at the end. If nothing is pruned, because of ``dry_run`` or an error, the
    detector gets it back and is as it was.

    Args:
        prune (Callable): A function of the model and any other arguments.

    Returns:
        Callable: The function.
    """
    signature = inspect.signature(prune)

    @functools.wraps(prune)
    def pruning(model: nn.Module, *args, **kwargs):
        dry_run = signature.bind(model, *args, **kwargs).arguments.get('dry_run', False)
        attention = set_aside(model)
        if attention is None:
            return prune(model, *args, **kwargs)
        snapshot, pruned = Snapshot(model), False
        try:
            result = prune(model, *args, **kwargs)
            pruned = not dry_run
        finally:
            if not pruned:
                snapshot.restore()
                attention.insert(model)
            forget_aside(model)
        return result

    return pruning

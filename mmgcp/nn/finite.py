# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Where a detector first computes values that are not finite."""
from functools import partial
from typing import Any, List, Sequence

import torch.nn as nn

from .forward import flatten_tensors, run_on_noise
from .hooks import on_outputs


def first_not_finite(model: nn.Module, shape: Sequence[int]) -> str:
    """Find the first layer that emits NaN or infinity if the predictions of a detector have any.

    Args:
        model (nn.Module): The detector, which runs in eval mode.
        shape (Sequence[int]): Shape (C, H, W) of the image of noise that it runs on.

    Returns:
        str: Name of the layer; empty if all predictions are finite, 'the detector' if they are
        not, but what its layers emit is.
    """
    if _is_finite(run_on_noise(model, shape)):
        return ''
    found: List[str] = []

    def look(name: str, _: Any, output: Any) -> None:
        if not _is_finite(output):
            found.append(name)

    names = [name for name, module in model.named_modules() if name and not [*module.children()]]
    with on_outputs(model, {name: partial(look, name) for name in names}):
        run_on_noise(model, shape)
    return found[0] if found else 'the detector'


def _is_finite(outputs: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in flatten_tensors(outputs))

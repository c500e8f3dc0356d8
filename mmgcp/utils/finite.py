# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Whether weights and running statistics are numbers that a network can compute with."""
from typing import Mapping, Optional

import torch.nn as nn
from torch import Tensor

STATISTICS = ('running_mean', 'running_var')


def describe_not_finite(model: nn.Module, state: Optional[Mapping[str, Tensor]] = None) -> str:
    """Find the first layer with parameters or running statistics that make outputs NaN or infinite.

    These are values that are not finite, and variances that are not positive together with the
    epsilon of their layer. Other buffers are not looked at.

    Args:
        model (nn.Module): The model.
        state (Mapping[str, Tensor], optional): Values to look at instead of the model's, by their
            names; those it does not have are left out. Defaults to None.

    Returns:
        str: Which layer has which values; empty if there is none.
    """
    for layer, module in model.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        names += [name for name in STATISTICS if getattr(module, name, None) is not None]
        for name in names:
            key = f'{layer}.{name}' if layer else name
            value = getattr(module, name) if state is None else state.get(key)
            if value is None:
                continue
            wrong = int((~value.isfinite()).sum())
            if wrong:
                return f'{key} has {wrong} of {value.numel()} values that are not finite'
            if name == 'running_var' and bool((value + getattr(module, 'eps', 0) <= 0).any()):
                return (f'{key} has a variance of {float(value.min()):g}, with which '
                        'outputs are not finite')
    return ''

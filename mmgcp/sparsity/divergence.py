# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Noticing that a training has diverged."""
from typing import Sequence

import torch

from mmgcp.errors import UserError

from .channels import LayerScales


class FiniteWatch:
    """Remembers at which iteration scale factors stopped being finite, and in which layers.

    Looking costs no time in which the CPU waits for a GPU; only :meth:`check` does.

    Args:
        layers (Sequence[LayerScales]): The layers.
    """

    def __init__(self, layers: Sequence[LayerScales]) -> None:
        self._layers = list(layers)
        self._first = torch.zeros_like(self._values(), dtype=torch.long)  # 0: finite until now

    def _values(self) -> torch.Tensor:
        return torch.cat([layer.gamma.detach().flatten() for layer in self._layers])

    def look(self, iteration: int) -> None:
        """Look at the scale factors after an iteration, counted from 1."""
        new = ~self._values().isfinite() & (self._first == 0)
        self._first.masked_fill_(new, iteration)

    def check(self) -> None:
        """Raise a UserError if scale factors were not finite when they were looked at."""
        if not bool(self._first.any()):
            return
        iteration = int(self._first[self._first > 0].min())
        parts = self._first.split([layer.gamma.numel() for layer in self._layers])
        names = [layer.name for layer, part in zip(self._layers, parts)
                 if bool((part == iteration).any())]
        others = f' and of {len(names) - 1} other layers' if len(names) > 1 else ''
        raise UserError(f'the training has diverged: from iteration {iteration} on, scale factors '
                        f'of {names[0]}{others} are not finite; a smaller learning rate, or a '
                        'smaller rate of the sparsity, may help')

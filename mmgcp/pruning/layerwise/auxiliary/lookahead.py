# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Running a detector that stays as it is once for several units of layers."""
from typing import Dict, List, Sequence, Tuple

import torch.nn as nn
from torch import Tensor

from .recording import Outputs, record_outputs


class OutputsAhead:
    """What layers of a detector put out for batches, as one unit of layers after the other asks.

    A run for one unit also records what the next ones will ask for, as far as that fits into
    memory, so that the detector need not run again for these.

    Args:
        order (dict[str, Sequence[str]]): The layers that each set asks for, in the order of
            the units.
        counts (dict[str, int]): How often each layer runs.
        sizes (dict[str, int]): About how many bytes its outputs for a batch have.
        max_bytes (float): So many may be kept.
    """

    def __init__(self, order: Dict[str, Sequence[str]], counts: Dict[str, int],
                 sizes: Dict[str, int], max_bytes: float):
        self._order = {name: list(layers) for name, layers in order.items()}
        self._counts, self._sizes, self._max_bytes = dict(counts), dict(sizes), max_bytes
        self._positions = {name: position for position, name in enumerate(order)}
        # position of the last unit that asks for a layer
        self._last = {layer: self._positions[name]
                      for name, layers in order.items() for layer in layers}
        # by number of the batch and layer: a sum that tells the batch, and the outputs
        self._kept: Dict[Tuple[int, str], Tuple[float, List[Tensor]]] = {}

    def __call__(self, model: nn.Module, name: str, number: int, images: Tensor) -> Outputs:
        """Return the outputs that a set asks for.

        Args:
            model (nn.Module): The detector, always with the same weights.
            name (str): The unit. Those before it do not ask any more.
            number (int): Number of the batch. If another batch comes under a number, what is
                known of that number is forgotten.
            images (Tensor): Its images (N, C, H, W).

        Returns:
            dict[str, list[Tensor]]: The outputs of each layer, call after call.
        """
        position, total = self._positions[name], float(images.double().sum())
        self._kept = {key: value for key, value in self._kept.items()
                      if self._last[key[1]] >= position
                      and (key[0] != number or value[0] == total)}
        known = {layer: value[1] for (batch, layer), value in self._kept.items()
                 if batch == number}
        missing = [layer for layer in self._order[name] if layer not in known]
        if missing:
            ahead = self._fitting(position, known)
            known.update(record_outputs(model, images, {
                layer: self._counts[layer] for layer in dict.fromkeys((*missing, *ahead))}))
            self._kept.update(((number, layer), (total, known[layer])) for layer in ahead)
        return {layer: known[layer] for layer in self._order[name]}

    def _fitting(self, position: int, known: Outputs) -> List[str]:
        """The layers that later sets ask for and that are not known, as far as they fit."""
        room = self._max_bytes - sum(self._sizes[layer] for _, layer in self._kept)
        fitting: Dict[str, None] = {}
        for layers in list(self._order.values())[position + 1:]:
            for layer in layers:
                if layer not in known and layer not in fitting:
                    room -= self._sizes[layer]
                    if room < 0:
                        return list(fitting)
                    fitting[layer] = None
        return list(fitting)

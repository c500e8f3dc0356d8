# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which layer group a layer belongs to."""
from fnmatch import fnmatchcase
from typing import Dict, Iterable, List, Sequence

import torch.nn as nn

from .structures import LayerGroup, PruningError


def assign_groups(model: nn.Module, layers: Iterable[str],
                  groups: Sequence[LayerGroup]) -> Dict[str, LayerGroup]:
    """Find the group of each layer.

    Args:
        model (nn.Module): The model.
        layers (Iterable[str]): Names of the layers that need a group.
        groups (Sequence[LayerGroup]): The groups.

    Returns:
        dict[str, LayerGroup]: The group of each layer that is in one; the others
        are not pruned.

    Raises:
        PruningError: A pattern matches nothing, a layer is in two groups, or two
            groups have the same name.
    """
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise PruningError(f'two layer groups have the same name: {names}')
    modules = [name for name, _ in model.named_modules() if name]
    for group in groups:
        for pattern in group.modules:
            if not any(fnmatchcase(name, pattern) for name in modules):
                raise PruningError(f'pattern {pattern!r} of layer group {group.name!r} '
                                   'matches no module of the model')
    assigned = {}
    for layer in layers:
        owners = [group for group in groups if _contains(group, layer)]
        if len(owners) > 1:
            raise PruningError(f'layer {layer!r} is in two layer groups: '
                               f'{owners[0].name!r} and {owners[1].name!r}')
        if owners:
            assigned[layer] = owners[0]
    return assigned


def _contains(group: LayerGroup, layer: str) -> bool:
    parts = layer.split('.')
    prefixes: List[str] = ['.'.join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(prefix, pattern) for prefix in prefixes for pattern in group.modules)

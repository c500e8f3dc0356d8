# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which layer group a layer belongs to."""
from fnmatch import fnmatchcase
from typing import Dict, Iterable, Sequence

import torch.nn as nn

from mmgcp.errors import PruningError

from .units import LayerGroup


def assign_groups(model: nn.Module, layers: Iterable[str],
                  groups: Sequence[LayerGroup]) -> Dict[str, LayerGroup]:
    """Find the layer group of each layer.

    Args:
        model (nn.Module): The model.
        layers (Iterable[str]): Names of the layers.
        groups (Sequence[LayerGroup]): The groups.

    Returns:
        dict[str, LayerGroup]: The group of each layer that is in one. The other layers are
        not pruned.

    Raises:
        PruningError: A pattern matches nothing, a layer is in two groups, or two groups have
            the same name.
    """
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise PruningError(f'two layer groups have the same name: {names}')
    modules = [name for name, _ in model.named_modules() if name]
    matchers = [_Matcher(group) for group in groups]
    for matcher in matchers:
        matcher.check(modules)
    assigned = {}
    for layer in layers:
        owners = [matcher.group for matcher in matchers if matcher.contains(layer)]
        if len(owners) > 1:
            raise PruningError(f'layer {layer!r} is in two layer groups: '
                               f'{owners[0].name!r} and {owners[1].name!r}')
        if owners:
            assigned[layer] = owners[0]
    return assigned


class _Matcher:
    """The patterns of a layer group; plain names are kept apart, which is faster.

    Args:
        group (LayerGroup): The group.
    """

    def __init__(self, group: LayerGroup):
        self.group = group
        self.patterns = [pattern for pattern in group.modules if set(pattern) & set('*?[')]
        self.names = set(group.modules) - set(self.patterns)

    def check(self, modules: Sequence[str]) -> None:
        """Raise a PruningError if a pattern matches none of the modules."""
        useless = sorted(self.names - set(modules)) + [
            pattern for pattern in self.patterns
            if not any(fnmatchcase(name, pattern) for name in modules)]
        if useless:
            raise PruningError(f'pattern {useless[0]!r} of layer group {self.group.name!r} '
                               'matches no module of the model')

    def contains(self, layer: str) -> bool:
        """Whether a pattern matches the layer or a module that contains it."""
        parts = layer.split('.')
        around = ['.'.join(parts[:length]) for length in range(1, len(parts) + 1)]
        return not self.names.isdisjoint(around) or any(
            fnmatchcase(name, pattern) for name in around for pattern in self.patterns)

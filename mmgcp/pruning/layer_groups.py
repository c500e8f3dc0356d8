# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Layer groups: from configs or derived from the model, and which of them a layer is in."""
import math
from collections import defaultdict
from dataclasses import fields, replace
from fnmatch import fnmatchcase
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple, Union

import torch.nn as nn

from mmgcp.errors import PruningError, shown
from mmgcp.nn.forward import IMAGE_SHAPE, record_shapes
from mmgcp.nn.layers import channel_counts
from mmgcp.utils.checks import check_value, instance_of, list_of

from .units import LayerGroup

GROUPS = list_of(instance_of(LayerGroup, dict, text=''),
                 "must be 'auto' or a list of layer groups", empty=True)
KINDS = ('backbone', 'top-down', 'bottom-up', 'head')
BOTTOM_UP = ('bottom_up', 'downsample', 'pafpn', 'out_', 'extra_')
NO_STRIDE = math.inf

# 'auto', or groups, some perhaps as configs
Groups = Union[str, Sequence[Union[LayerGroup, dict]]]
# Name of a layer that ran and its stride; NO_STRIDE if its output is no feature map
Run = Tuple[str, float]


def make_groups(model: nn.Module, groups: Groups, ratio: Optional[float],
                input_shape: Sequence[int]) -> List[LayerGroup]:
    """Return the layer groups that an option stands for, all with the ratio if there is one.

    Raises a PruningError if they are not well-formed or there are none.
    """
    made = read_groups(groups)
    if made is None:
        made = auto_groups(model, input_shape)
    if ratio is not None:
        made = [replace(group, ratio=ratio, threshold=None) for group in made]
    return made


def read_groups(groups: Groups) -> Optional[List[LayerGroup]]:
    """Read the layer groups of an option, which needs no model; None for 'auto'.

    Raises a PruningError if they are not well-formed or there are none.
    """
    if isinstance(groups, str) and groups == 'auto':
        return None
    check_value('groups', groups, GROUPS, PruningError)
    allowed, made = {field.name for field in fields(LayerGroup)}, []
    for group in groups:
        if not isinstance(group, LayerGroup):
            if not {'name', 'modules'} <= set(group) <= allowed:
                raise PruningError('a layer group has name, modules and perhaps ratio or '
                                   f'threshold, but here it has {shown(sorted(group, key=str))}')
            group = LayerGroup(**group)
        made.append(group)
    if not made:
        raise PruningError('there are no layer groups: nothing would be pruned')
    return made


def assign_groups(model: nn.Module, layers: Iterable[str],
                  groups: Sequence[LayerGroup]) -> Dict[str, LayerGroup]:
    """Return the layer group of each layer that is in one.

    Raises a PruningError if a pattern matches nothing, a layer is in two groups, or two groups
    have the same name.
    """
    names = [group.name for group in groups]
    if len(set(names)) != len(names):
        raise PruningError(f'two layer groups have the same name: {names}')
    layers = list(layers)
    modules = {name for name, _ in model.named_modules() if name}
    known = modules.union(layers)  # some layers are parameters
    owners: Dict[str, List[LayerGroup]] = {}  # by name of what a pattern matches
    for group in groups:
        for pattern in group.modules:
            matched = ([pattern] if pattern in modules else
                       [name for name in known if fnmatchcase(name, pattern)])
            if modules.isdisjoint(matched):
                raise PruningError(f'pattern {pattern!r} of layer group {group.name!r} matches no '
                                   'module of the model')
            for name in matched:
                owners.setdefault(name, []).append(group)
    assigned = {}
    for layer in layers:
        parts = layer.split('.')
        around = ['.'.join(parts[:length]) for length in range(1, len(parts) + 1)]
        found = {group.name: group for name in around for group in owners.get(name, ())}
        if len(found) > 1:
            first, second = sorted(found, key=names.index)[:2]
            raise PruningError(f'layer {layer!r} is in two layer groups: {first!r} and {second!r}')
        assigned.update((layer, group) for group in found.values())
    return assigned


def auto_groups(model: nn.Module, input_shape: Sequence[int] = IMAGE_SHAPE) -> List[LayerGroup]:
    """Group the layers of a detector by their kind and the stride of their feature maps.

    The kind follows from the name: ``backbone.*`` is backbone, ``neck.*`` is top-down or
    bottom-up, and everything else is head. A layer of a neck is bottom-up if the neck's
    attribute that contains it starts with ``downsample``, ``bottom_up``, ``pafpn``, ``out_`` or
    ``extra_``, as in MMYOLO's necks and in MMDetection's PAFPN and SSDNeck. All others, such as
    those of FPN and YOLOV3Neck, are top-down.

    The stride is the height of the image divided by that of the layer's output, rounded to a
    power of two. Layers without a stride of their own, linear ones and those that emit 1x1 maps,
    take that of a layer with one in the smallest enclosing module that contains any: the last to
    run before them, or else the first after them. Groups have no stride if their layers run at
    several strides, as in a head shared by the levels, are in a ``roi_head``, or are in a head
    and do not run in eval mode. Other layers that do not run join the smallest stride of their
    kind.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`.
        input_shape (Sequence[int]): Shape (C, H, W) in pixels of the image to run it with,
            larger than the largest stride. Defaults to (3, 640, 640).

    Returns:
        list[LayerGroup]: The groups, called for example ``backbone-8``, ordered by kind
        (backbone, top-down, bottom-up, head), then by stride. Each layer with channels is in
        one of them. They have neither ratio nor threshold.

    Raises:
        PruningError: The model does not run.
    """
    layers: Dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # layers inside of layers go with these
        if channel_counts(module) and not any(name.startswith(f'{layer}.') for layer in layers):
            layers[name] = module
    try:
        shapes = record_shapes(model, layers, input_shape)
    except Exception as error:  # whatever the model raises
        raise PruningError('the strides of the layers cannot be found, as the model does not run: '
                           f'{type(error).__name__}: {error}') from error
    strides = _find_strides([(name, _stride(layers[name], output, input_shape[1]))
                             for name, _, output in shapes])
    kinds = {name: _kind(name) for name in layers}
    smallest = {kind: min((strides[name] for name in strides if kinds[name] == kind),
                          default=NO_STRIDE) for kind in KINDS}
    smallest['head'] = NO_STRIDE
    members: Dict[Tuple[int, float], List[str]] = defaultdict(list)
    for name, kind in kinds.items():
        members[KINDS.index(kind), strides.get(name, smallest[kind])].append(name)
    return [LayerGroup(KINDS[kind] if stride == NO_STRIDE else f'{KINDS[kind]}-{stride}',
                       tuple(members[kind, stride])) for kind, stride in sorted(members)]


def _stride(layer: nn.Module, output: Sequence[int], height: int) -> float:
    """Return the stride of a layer from the shape of its output and the image's height."""
    if isinstance(layer, nn.Linear) or len(output) != 4 or tuple(output[2:]) == (1, 1):
        return NO_STRIDE
    return 2**max(0, round(math.log2(height / output[2])))


def _find_strides(runs: Sequence[Run]) -> Dict[str, float]:
    """Return the strides of the layers that ran."""
    found: Dict[str, Set[float]] = defaultdict(set)
    for index, (name, stride) in enumerate(runs):
        found[name].add(_nearby_stride(runs, index) if stride == NO_STRIDE else stride)
    return {name: NO_STRIDE if len(strides) > 1 or 'roi_head' in name.split('.') else min(strides)
            for name, strides in found.items()}


def _nearby_stride(runs: Sequence[Run], index: int) -> float:
    """Return the stride for a run of a layer that has none of its own."""
    around = runs[index][0]
    while around:
        around = around.rpartition('.')[0]
        prefix = around and f'{around}.'
        maps = [(number, stride) for number, (name, stride) in enumerate(runs)
                if stride != NO_STRIDE and name.startswith(prefix)]
        if maps:
            before = [stride for number, stride in maps if number < index]
            return before[-1] if before else maps[0][1]
    return NO_STRIDE


def _kind(name: str) -> str:
    """Return the kind of a layer, which its name tells."""
    first, *parts = name.split('.')
    if first != 'neck':
        return 'backbone' if first == 'backbone' else 'head'
    # A neck may be a sequence of necks; their numbers are no attributes
    attribute = next((part for part in parts if not part.isdigit()), '')
    return 'bottom-up' if attribute.startswith(BOTTOM_UP) else 'top-down'

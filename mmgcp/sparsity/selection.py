# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which scale factors of a model are penalised, how strongly and which of them together."""
import fnmatch
from typing import Any, ContextManager, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.attention import attention_aside
from mmgcp.errors import PruningError, UserError, shown
from mmgcp.nn.forward import IMAGE_SHAPE, head_left_out_on_demand
from mmgcp.nn.layers import find_layer
from mmgcp.pruning.layer_groups import assign_groups, auto_groups
from mmgcp.pruning.prunable import find_prunable_or_leave_head_out, shape_or_leave_head_out
from mmgcp.pruning.units import LayerGroup
from mmgcp.utils.checks import MAPPING, NAME, PATTERNS, check_value, list_of, number_in
from mmgcp.utils.process_state import random_states_kept

from .channels import OTHER, LayerScales, ScaleFactors

PRUNABLE = 'prunable'
GROUPS = list_of(MAPPING, "must be 'auto' or a sequence of dicts")
RATE_FACTOR = number_in(0, 1e6)

Groups = Union[str, Sequence[dict], None]


def select_scale_factors(model: nn.Module,
                         modules: Union[str, Sequence[str], None] = None,
                         exclude: Optional[Sequence[str]] = None,
                         coupled: bool = False,
                         groups: Groups = None,
                         input_shape: Sequence[int] = IMAGE_SHAPE) -> ScaleFactors:
    """Choose the scale factors of a model's BatchNorm layers, a shared one once.

    Args:
        model (nn.Module): The model.
        modules (str | Sequence[str], optional): Patterns of the layers' names, 'prunable'
            for the channels that pruning could remove, or None for all.
        exclude (Sequence[str], optional): Patterns of the names of layers to leave out.
        coupled (bool): Whether to treat channels that can only be removed together as one.
        groups (str | Sequence[dict], optional): Layer groups with their factors on the
            rate, or 'auto'; see :class:`mmgcp.sparsity.DynamicSparsityHook`.
        input_shape (Sequence[int]): Shape (C, H, W) in pixels of an image to trace the
            model with.

    Returns:
        ScaleFactors: The chosen ones, in the model's order.

    Raises:
        UserError: A pattern matches no layer, no layer is left, a layer is in two groups, or
            the model cannot be traced (in particular if Torch-Pruning is not installed).
    """
    with head_left_out_on_demand(model):
        return _select(model, modules, exclude, coupled, groups, input_shape)


def _select(model: nn.Module, modules: Union[str, Sequence[str], None],
            exclude: Optional[Sequence[str]], coupled: bool, groups: Groups,
            input_shape: Sequence[int]) -> ScaleFactors:
    prunable = modules == PRUNABLE
    segments = _trace(model, input_shape) if coupled or prunable else {}
    layers = _find_layers(model, None if prunable else modules, exclude)
    if prunable:
        layers = {name: gamma for name, gamma in layers.items() if id(gamma) in segments}
    if not layers:
        raise UserError(f'no BatchNorm layer is left by modules={modules}, exclude={exclude}')
    owners, factors = _assign(model, list(layers), groups, input_shape)
    chosen = []
    for name, gamma in layers.items():
        segment = segments.get(id(gamma))
        chosen.append(LayerScales(
            name, gamma,
            chosen=segment >= 0 if prunable else None,
            segments=segment if coupled else None,
            group=owners.get(name, OTHER),
            rate_factor=factors.get(owners.get(name), 1.)))
    return ScaleFactors(chosen)


def check_selection(modules: Any, exclude: Any, groups: Any) -> None:
    """Raise a UserError if one of these arguments of :func:`select_scale_factors` is malformed."""
    for name, value in dict(modules=modules, exclude=exclude).items():
        if value is None or name == 'modules' and isinstance(value, str) and value == PRUNABLE:
            continue
        check_value(name, value, PATTERNS)
    if groups is None or isinstance(groups, str) and groups == 'auto':
        return
    check_value('groups', groups, GROUPS)
    for group in groups:
        _check_group(group)
    names = [group['name'] for group in groups]
    if len(set(names)) < len(names):
        raise UserError(f'the names of the groups must differ, but they are {names}')


def _check_group(group: dict) -> None:
    keys = set(group)
    if not {'name', 'modules'} <= keys <= {'name', 'modules', 'rate_factor'}:
        raise UserError("a group must have the keys 'name' and 'modules' and may have "
                        f"'rate_factor', but has {shown(sorted(group, key=str))}")
    name = group['name']
    check_value('the name of a group', name, NAME)
    check_value(f'modules of the group {name!r}', group['modules'], PATTERNS)
    check_value(f'rate_factor of the group {name!r}', group.get('rate_factor', 1), RATE_FACTOR)
    if name == OTHER:
        raise UserError(f'a group must not have the name {OTHER!r}, which stands for the '
                        'layers of no group')


def _find_layers(model: nn.Module, modules: Optional[Sequence[str]],
                 exclude: Optional[Sequence[str]]) -> Dict[str, nn.Parameter]:
    """Return the matching layers' scale factors, each once, by the first name of its layer."""
    layers = {
        name: module.weight
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, _BatchNorm) and module.affine
    }
    included = {id(layers[name]) for name in _match(layers, ['*'] if modules is None else modules)}
    excluded = {id(layers[name]) for name in _match(layers, exclude or [])}
    names: Dict[int, str] = {}
    for name, gamma in layers.items():
        names.setdefault(id(gamma), name)
    return {name: layers[name] for key, name in names.items() if key in included - excluded}


def _match(layers: Dict[str, nn.Parameter], patterns: Sequence[str]) -> Set[str]:
    matched: Set[str] = set()
    for pattern in patterns:
        names = fnmatch.filter(layers, pattern)
        if not names:
            raise UserError(f'the pattern {pattern!r} matches no affine BatchNorm layer')
        matched.update(names)
    return matched


def _trace(model: nn.Module, input_shape: Sequence[int]) -> Dict[int, Tensor]:
    """Index the prunable channel (C, ) of each channel of a BatchNorm, by the id of its weight.

    Channels that cannot be pruned have -1.
    """
    try:
        with _random_states_kept(), attention_aside(model, put_back=True):
            units = find_prunable_or_leave_head_out(model, input_shape).units
    except PruningError as error:
        raise PruningError("modules='prunable' and coupled=True look at the model as pruning "
                           f'does, but {error}') from error
    segments: Dict[int, Tensor] = {}
    offset = 0
    for unit in units:
        for item in unit.side('out'):
            layer = find_layer(model, item.module)
            if isinstance(layer, _BatchNorm) and layer.affine and len(item.channels):
                segment = segments.setdefault(
                    id(layer.weight), torch.full((layer.num_features, ), -1))
                segment[item.channels] = offset + item.unit_index
        offset += unit.size
    return segments


def _assign(model: nn.Module, layers: Sequence[str], groups: Groups,
            input_shape: Sequence[int]) -> Tuple[Dict[str, str], Dict[str, float]]:
    """Return the group of each layer that is in one, and the factor of each group."""
    if groups is None:
        return {}, {}
    if groups == 'auto':
        with _random_states_kept():
            shape = shape_or_leave_head_out(model, input_shape)
            layer_groups: List[LayerGroup] = auto_groups(model, (shape[0], *input_shape[1:]))
        factors: Dict[str, float] = {}
    else:
        layer_groups = [LayerGroup(group['name'], tuple(group['modules'])) for group in groups]
        factors = {group['name']: float(group.get('rate_factor', 1)) for group in groups}
    owners = {layer: group.name
              for layer, group in assign_groups(model, layers, layer_groups).items()}
    empty = sorted(set(factors) - set(owners.values()))
    if empty:
        raise UserError(f'the group {empty[0]!r} has none of the chosen BatchNorm layers')
    return owners, factors


def _random_states_kept() -> ContextManager[None]:
    """Keep a run of the model from changing what training draws at random afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return random_states_kept(devices)

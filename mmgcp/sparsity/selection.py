# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which scale factors of a model are penalised, how strongly and which of them together."""
import fnmatch
from typing import Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from mmengine.utils import is_seq_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmgcp.attention import attention_aside
from mmgcp.errors import PruningError, UserError
from mmgcp.nn.forward import IMAGE_SHAPE, working_shape
from mmgcp.nn.layers import find_layer
from mmgcp.pruning.auto_groups import auto_groups
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.pruning.units import LayerGroup

from .channels import OTHER, Channels, ScaleFactor

PRUNABLE = 'prunable'


class ScaleFactors:
    """The scale factors that are penalised.

    Args:
        layers (Sequence[ScaleFactor]): The layers, at least one.
    """

    def __init__(self, layers: Sequence[ScaleFactor]) -> None:
        self.layers = list(layers)
        self._trained: Tuple[Optional[List[bool]], Optional[Channels]] = (None, None)

    @property
    def gammas(self) -> List[nn.Parameter]:
        """The weights of all layers."""
        return [layer.gamma for layer in self.layers]

    def trained(self) -> Optional[Channels]:
        """The channels of the layers that are not frozen; None if all are."""
        # Not once for all: detectors freeze their stages when they enter train mode.
        flags = [layer.gamma.requires_grad for layer in self.layers]
        if flags != self._trained[0]:
            layers = [layer for layer, flag in zip(self.layers, flags) if flag]
            self._trained = flags, Channels(layers) if layers else None
        return self._trained[1]


def select_scale_factors(model: nn.Module,
                         modules: Union[str, Sequence[str], None] = None,
                         exclude: Optional[Sequence[str]] = None,
                         unit: bool = False,
                         groups: Union[str, Sequence[dict], None] = None,
                         input_shape: Sequence[int] = IMAGE_SHAPE) -> ScaleFactors:
    """Choose the scale factors of a model's BatchNorm layers.

    Args:
        model (nn.Module): The model.
        modules (str | Sequence[str], optional): Patterns of the layers' names, 'prunable'
            for the channels that pruning could remove, or None for all.
        exclude (Sequence[str], optional): Patterns of the names of layers to leave out.
        coupled (bool): Whether channels that can only be pruned together are one.
        groups (str | Sequence[dict], optional): Layer groups with their factors on the
            rate, or 'auto'.
        input_shape (Sequence[int]): Shape (C, H, W) of an image to trace the model with.

    Returns:
        ScaleFactors: The chosen ones, in the model's order.

    Raises:
        ValueError: If a pattern matches no layer, if no layer is left, if a layer is in
            two groups, or if the model cannot be traced (without Torch-Pruning, too).
    """
    segments: Dict[int, Tensor] = {}
    if unit or modules == PRUNABLE:
        segments = _trace(model, input_shape)
    prunable = modules == PRUNABLE
    layers = _find_layers(model, None if prunable else modules, exclude)
    if prunable:
        layers = {name: gamma for name, gamma in layers.items() if id(gamma) in segments}
    if not layers:
        raise UserError(f'No BatchNorm layer is left by modules={modules}, exclude={exclude}.')
    owners, factors = _assign(model, list(layers), groups, input_shape)
    chosen = []
    for name, gamma in layers.items():
        segment = segments.get(id(gamma))
        chosen.append(ScaleFactor(
            name, gamma,
            chosen=segment >= 0 if prunable else None,
            segments=segment if unit else None,
            group=owners.get(name, OTHER),
            rate_factor=factors.get(owners.get(name), 1.)))
    return ScaleFactors(chosen)


def check_groups(groups: Union[str, Sequence[dict], None]) -> None:
    """Raise an error if layer groups are not well-formed; see :class:`DynamicSparsityHook`."""
    if groups is None or groups == 'auto':
        return
    if isinstance(groups, str) or not is_seq_of(groups, dict):
        raise TypeError(f"groups must be 'auto' or a sequence of dicts, but got {groups!r}.")
    for group in groups:
        keys = set(group)
        if not {'name', 'modules'} <= keys <= {'name', 'modules', 'rate_factor'}:
            raise ValueError('A group has name, modules and perhaps rate_factor, but got '
                             f'{sorted(keys)}.')
        if isinstance(group['modules'], str) or not is_seq_of(group['modules'], str):
            raise TypeError(f"modules of the group {group['name']!r} must be a sequence of "
                            f"patterns, but got {group['modules']!r}.")
        if not group.get('rate_factor', 1) >= 0:
            raise ValueError(f"rate_factor of the group {group['name']!r} must not be negative, "
                             f"but got {group['rate_factor']}.")
        if group['name'] == OTHER:
            raise ValueError(f'No group can have the name {OTHER!r}: it is that of the rest.')


def find_gammas(model: nn.Module,
                modules: Optional[Sequence[str]] = None,
                exclude: Optional[Sequence[str]] = None) -> List[nn.Parameter]:
    """The scale factors of a model's BatchNorm layers, a shared one once.

    Args:
        model (nn.Module): The model.
        modules (Sequence[str], optional): Patterns of the layers' names, None for all.
        exclude (Sequence[str], optional): Patterns of the names of layers to leave out.

    Returns:
        List[nn.Parameter]: The weights, in the model's order.
    """
    return select_scale_factors(model, modules, exclude).gammas


def _find_layers(model: nn.Module, modules: Optional[Sequence[str]],
                 exclude: Optional[Sequence[str]]) -> Dict[str, nn.Parameter]:
    """The matching layers' scale factors, each once, by the first name of its layer."""
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
            raise UserError(f'The pattern {pattern!r} matches no affine BatchNorm layer.')
        matched.update(names)
    return matched


def _trace(model: nn.Module, input_shape: Sequence[int]) -> Dict[int, Tensor]:
    """The prunable channels of each BatchNorm layer, by the id of its weight.

    Returns:
        dict: Number (C, ) of the coupled channel that each of the layer's channels is a part
        of; -1 for those that cannot be pruned.
    """
    try:
        with _same_randomness(), attention_aside(model, put_back=True):
            units, _ = find_units(model, working_shape(model, input_shape))
    except PruningError as error:
        raise PruningError("modules='prunable' and coupled=True look at the model as pruning "
                           f'does, but {error}') from error
    segments: Dict[int, Tensor] = {}
    offset = 0
    for unit in units:
        for item in unit.side('out'):
            layer = find_layer(model, item.module)
            if isinstance(layer, _BatchNorm) and layer.affine and len(item.channels):
                numbers = segments.setdefault(
                    id(layer.weight), torch.full((layer.num_features, ), -1))
                numbers[item.channels] = offset + item.unit_index
        offset += unit.size
    return segments


def _same_randomness():
    """Running the model must not change what is drawn in training."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    return torch.random.fork_rng(devices=devices)


def _assign(model: nn.Module, layers: Sequence[str],
            groups: Union[str, Sequence[dict], None],
            input_shape: Sequence[int]) -> Tuple[Dict[str, str], Dict[str, float]]:
    """The group of each layer that is in one, and the factor of each group."""
    if groups is None:
        return {}, {}
    if groups == 'auto':
        with _same_randomness():
            layer_groups, factors = auto_groups(model, input_shape), {}
    else:
        layer_groups = [LayerGroup(group['name'], tuple(group['modules'])) for group in groups]
        factors = {group['name']: float(group.get('rate_factor', 1)) for group in groups}
    owners = {layer: group.name
              for layer, group in assign_groups(model, layers, layer_groups).items()}
    empty = sorted(set(factors) - set(owners.values()))
    if empty:
        raise UserError(f'The group {empty[0]!r} has none of the chosen BatchNorm layers.')
    return owners, factors

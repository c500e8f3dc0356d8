# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Groups of layers that are distilled with the same kind of loss."""
import copy
import warnings
from dataclasses import dataclass, field
from typing import List, Sequence, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError, shown, told
from mmgcp.nn.lookup import find_module
from mmgcp.registry import MODELS, build_part
from mmgcp.utils.checks import CONFIG, LOSS_WEIGHT, MAPPING, NAME, check_value, list_of

from .feature_losses import AdaptedLoss
from .part_outputs import count_feature_channels, find_part_outputs

GROUPS = list_of(MAPPING, "must be 'auto' or a list of groups", empty=True)
PARTS = {'backbone_outputs': 'backbone', 'neck_outputs': 'neck'}
# A ten-thousandth of the paper's weights for the backbone and the finer one of the other groups
DEFAULT_WEIGHTS = dict(backbone=1e2, neck=1.)


@dataclass
class DistillationGroup:
    """Layers that share a kind of loss and its weight.

    Attributes:
        name (str): The loss is reported as ``loss_<kind>_<name>``.
        layers (list[tuple[str, str]] | str): The layers' names in student and teacher, or
            one of :data:`PARTS` until :func:`connect_groups` replaces it.
        template (nn.Module): The loss, of which each layer gets a copy in ``losses``.
        optional (bool): Whether to leave the group out if the detectors lack the part.
    """
    name: str
    layers: Union[List[Tuple[str, str]], str]
    template: nn.Module
    losses: List[nn.Module] = field(default_factory=list)
    optional: bool = False

    @property
    def loss_name(self) -> str:
        """The name that the loss is reported with."""
        return f'loss_{getattr(self.template, "kind", "feature")}_{self.name}'

    @property
    def adapters(self) -> List[nn.Module]:
        """The adapters of its losses."""
        return [loss.adapter for loss in self.losses
                if getattr(loss, 'adapter', None) is not None]

    def compute(self, student_features: dict, teacher_features: dict) -> Tensor:
        """Sum the losses of the layers, from the features (N, C, H, W) by name."""
        return sum(loss(student_features[student], teacher_features[teacher])
                   for loss, (student, teacher) in zip(self.losses, self.layers))


def read_groups(configs: Union[str, Sequence[dict]], loss: dict) -> List[DistillationGroup]:
    """Read the groups of a config and build their losses, before there are any models.

    The arguments are those of :class:`SpatialAttentionDistiller`. A UserError is raised if a
    group is malformed or two groups have the same name.
    """
    optional = isinstance(configs, str) and configs == 'auto'
    if optional:
        configs = [dict(name=name, weight=weight, layers=f'{name}_outputs')
                   for name, weight in DEFAULT_WEIGHTS.items()]
    check_value('groups', configs, GROUPS)
    check_value('loss', loss, CONFIG)
    groups = [_read_group(config, loss, optional) for config in configs]
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise UserError(f'the names of the groups must differ, but they are {names}')
    return groups


def _read_group(config: dict, loss: dict, optional: bool) -> DistillationGroup:
    keys = {'name', 'weight', 'layers'}
    if not keys <= set(config) <= keys | {'loss'}:
        raise UserError("a group must have the keys 'name', 'weight' and 'layers' and may have "
                        f"'loss', but has {shown(sorted(config, key=str))}")
    check_value('the name of a group', config['name'], NAME)
    where, layers = f'of the group {config["name"]!r}', config['layers']
    check_value(f'the weight {where}', config['weight'], LOSS_WEIGHT)
    if not (layers in PARTS if isinstance(layers, str) else isinstance(layers, (list, tuple))
            and layers):
        raise UserError(f'the layers {where} must be a list of names or one of {list(PARTS)}, but '
                        f'they are {shown(layers)}')
    check_value(f'the loss {where}', config.get('loss', loss), CONFIG)
    return DistillationGroup(
        name=config['name'],
        layers=layers if isinstance(layers, str) else [as_pair(layer) for layer in layers],
        template=_build_loss(dict(config.get('loss', loss), loss_weight=config['weight'])),
        optional=optional)


def _build_loss(config: dict) -> nn.Module:
    """Build a loss between two features; a UserError says if it is none."""
    kind = shown(config['type'])
    loss = build_part(MODELS, config, 'loss between two features', callable)
    try:
        value = copy.deepcopy(loss)(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
        fits = isinstance(value, Tensor) and value.numel() == 1
    except Exception as error:  # whatever a module raises that is no loss
        raise UserError(f'{kind} is no loss between two features (N, C, H, W): '
                        f'{told(error)}') from error
    if not fits:
        raise UserError(f'{kind} is no loss between two features (N, C, H, W): it does not return '
                        'one number')
    return loss


def as_pair(layer: Union[str, Sequence[str]]) -> Tuple[str, str]:
    """Return the names in student and teacher of a layer that is given by one name or by both."""
    if isinstance(layer, str):
        return layer, layer
    if not (isinstance(layer, (list, tuple)) and len(layer) == 2
            and all(isinstance(name, str) for name in layer)):
        raise UserError('a layer must be a name or a pair of names (in student and teacher), '
                        f'but is {shown(layer)}')
    return tuple(layer)


def layer_names(groups: List[DistillationGroup], side: int) -> List[str]:
    """List the known layers of all groups in the student (side 0) or the teacher (side 1)."""
    return list(dict.fromkeys(pair[side] for group in groups if not isinstance(group.layers, str)
                              for pair in group.layers))


def check_layers(groups: List[DistillationGroup], model: nn.Module, side: int,
                 owner: str) -> None:
    """Raise a UserError if a model lacks one of the layers of :func:`layer_names`."""
    for name in layer_names(groups, side):
        find_module(model, name, owner)


def connect_groups(groups: List[DistillationGroup], student: nn.Module,
                   teacher: nn.Module) -> List[DistillationGroup]:
    """Find the layers of the groups in the models, and make their losses with adapters.

    Returns the groups that have layers. A UserError is raised if a model lacks a part, or the
    outputs of a part do not correspond.
    """
    connected = []
    for group in groups:
        if isinstance(group.layers, str):
            part = PARTS[group.layers]
            if group.optional and getattr(teacher, part, None) is None:
                continue
            group.layers = _part_layers(group.name, part, student, teacher)
        group.losses = [copy.deepcopy(group.template) for _ in group.layers]
        connected.append(group)
    _make_adapters(connected, student, teacher)
    return connected


def _part_layers(group: str, part: str, student: nn.Module,
                 teacher: nn.Module) -> List[Tuple[str, str]]:
    """Return the layers that emit the outputs of a part, output by output."""
    names = [find_part_outputs(model, part, owner)
             for model, owner in ((student, 'student'), (teacher, 'teacher'))]
    counts = [len(outputs) for outputs in names]
    if counts[0] != counts[1]:
        raise UserError(f'the {part}s of student and teacher must have the same outputs, but '
                        f'have {counts[0]} and {counts[1]}')
    layers = []
    for number, pair in enumerate(zip(*names)):
        if None in pair:
            warnings.warn(f'output {number} of the {part} is not distilled because none of its '
                          'modules emits it', stacklevel=2)
        else:
            layers.append(pair)
    if not layers:
        raise UserError(f'there is no layer for the group {group!r} because no module emits an '
                        f'output of the {part}')
    return layers


def _make_adapters(groups: List[DistillationGroup], student: nn.Module,
                   teacher: nn.Module) -> None:
    """Give losses that compare channel with channel their adapters where they need them."""
    adapted = [(loss, pair) for group in groups for loss, pair in zip(group.losses, group.layers)
               if isinstance(loss, AdaptedLoss)]
    if not adapted:
        return
    channels = [count_feature_channels(model, {pair[side] for _, pair in adapted}, owner)
                for side, (model, owner) in enumerate([(student, 'student'),
                                                       (teacher, 'teacher')])]
    for loss, names in adapted:
        loss.adapt(channels[0][names[0]], channels[1][names[1]])

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from dataclasses import dataclass
from typing import Any, Dict, List, Sequence, Tuple, Union

import torch.nn as nn
from mmdet.structures import OptSampleList, SampleList
from mmengine.model import BaseModel
from torch import Tensor

from mmgcp.registry import MODELS
from mmgcp.utils.errors import UserError
from mmgcp.utils.module_lookup import find_module

from .feature_recorder import FeatureRecorder
from .frozen_teacher import FrozenTeacher


@dataclass
class AttentionGroup:
    """Layers that share a loss and its weight.

    Attributes:
        name (str): Its loss is reported as ``loss_attention_<name>``.
        layers (list[tuple[str, str]]): The layers' names in student and teacher.
        loss (nn.Module): Called with the student's and the teacher's feature.
    """
    name: str
    layers: List[Tuple[str, str]]
    loss: nn.Module


@MODELS.register_module()
class SpatialAttentionDistiller(BaseModel):
    """Train a pruned detector to look where the unpruned one looks: the spatial
    attention distilling of `GCP-SAD <https://arxiv.org/abs/2306.01526>`_.

    The total loss is that of the student plus, over the groups g and their layers l,

    .. math::
        \\sum_g w_g \\sum_l mean((A(F_l^{student}) - A(F_l^{teacher}))^2)

    with the attention maps A of :func:`mmgcp.distillation.spatial_attention`. The two
    features may differ in their number of channels.

    To everything but training the distiller is its student: it has the student's
    modules, parameters and buffers under their own names, so its checkpoints,
    averaged ones included, are checkpoints of the student, and paramwise settings
    are those of the student. The teacher is no part of them (see
    :class:`mmgcp.distillation.FrozenTeacher`).

    Args:
        student (dict): Config of the student's model.
        teacher (dict): ``config``, a config file or the config of a model, and
            ``checkpoint``, a file. Relative paths start at the working directory.
        groups (Sequence[dict]): For each group its ``name``, ``weight`` and
            ``layers``, names as in ``named_modules()``; a pair of names stands for
            a layer whose name differs between student and teacher.
        loss (dict): Config of the loss of a layer, built with the group's weight as
            ``loss_weight``. Defaults to dict(type='mmgcp.SpatialAttentionLoss').

    Raises:
        UserError: The teacher's config or checkpoint does not exist, they do not fit
            each other, the student or the teacher lacks a layer, or a group is
            incomplete.
        TypeError: The student is no detector.
    """

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 groups: Sequence[dict],
                 loss: dict = dict(type='mmgcp.SpatialAttentionLoss')):
        # All before anything is loaded: a mistake shall not cost the wait.
        attention_groups = _build_groups(groups, loss)
        if set(teacher) != {'config', 'checkpoint'}:
            raise UserError("teacher must have the keys 'config' and 'checkpoint', "
                            f'but has {sorted(teacher)}')
        student = MODELS.build(student)
        if not isinstance(student, BaseModel):
            raise TypeError(f'the student must be a detector, but is a {type(student).__name__}')
        super().__init__(data_preprocessor=student.data_preprocessor)
        # One set of modules seen from two objects. These dicts are shared and not
        # copied, which deepcopy and pickle preserve, so that a module replaced
        # through one is replaced in the other.
        for name in ('_modules', '_parameters', '_buffers', '_non_persistent_buffers_set'):
            self.__dict__[name] = student.__dict__[name]
        self.__dict__['student'] = student
        self.groups = attention_groups
        self._check_layers(student, 0, 'student')
        self._teacher = FrozenTeacher(**teacher)
        self._check_layers(self._teacher.module, 1, 'teacher')

    @property
    def teacher(self) -> nn.Module:
        """nn.Module: The teacher's detector, in eval mode and without gradients."""
        return self._teacher.module

    def forward(self,
                inputs: Tensor,
                data_samples: OptSampleList = None,
                mode: str = 'tensor') -> Union[Dict[str, Tensor], list, tuple, Tensor]:
        """Run the student and, for its losses, the teacher.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            data_samples (list[DetDataSample] | dict, optional): What the student
                takes. Defaults to None.
            mode (str): 'loss' for :meth:`loss`, 'predict' and 'tensor' for the
                student's outputs. Defaults to 'tensor'.

        Returns:
            dict | list | tuple | Tensor: Depends on the mode as in the student.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)

    def loss(self, inputs: Tensor, data_samples: Union[SampleList, dict]) -> Dict[str, Tensor]:
        """The student's losses and ``loss_attention_<name>`` of each group.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            data_samples (list[DetDataSample] | dict): What the student takes.

        Returns:
            dict[str, Tensor]: The losses.
        """
        teacher_features = self._teacher.features(inputs, self._layer_names(1))
        with FeatureRecorder(self.student, self._layer_names(0), 'student') as features:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
        for group in self.groups:
            losses[f'loss_attention_{group.name}'] = sum(
                group.loss(features[student_name], teacher_features[teacher_name])
                for student_name, teacher_name in group.layers)
        return losses

    def init_weights(self) -> None:
        """Initialise the student; the teacher has its checkpoint."""
        self.student.init_weights()

    def train(self, mode: bool = True) -> 'SpatialAttentionDistiller':
        """Set the student's mode; the teacher stays in eval mode."""
        self.training = mode
        self.student.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        """The student's attributes where the distiller has none of that name."""
        student = self.__dict__.get('student')
        if student is None:  # under construction, or being copied
            return super().__getattr__(name)
        return getattr(student, name)

    def _save_to_state_dict(self, *args, **kwargs) -> None:
        self.student._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.student._load_from_state_dict(*args, **kwargs)

    def _layer_names(self, side: int) -> List[str]:
        """Names of all distilled layers in the student (0) or the teacher (1)."""
        return list(dict.fromkeys(pair[side] for group in self.groups for pair in group.layers))

    def _check_layers(self, model: nn.Module, side: int, owner: str) -> None:
        for name in self._layer_names(side):
            find_module(model, name, owner)


def _build_groups(configs: Sequence[dict], loss: dict) -> List[AttentionGroup]:
    if not configs:
        raise UserError('groups must not be empty: there would be nothing to distil')
    groups = [_build_group(config, loss) for config in configs]
    names = [group.name for group in groups]
    if len(set(names)) < len(names):
        raise UserError(f'the names of the groups must differ, but they are {names}')
    return groups


def _build_group(config: dict, loss: dict) -> AttentionGroup:
    if set(config) != {'name', 'weight', 'layers'}:
        raise UserError("a group must have the keys 'name', 'weight' and 'layers', "
                        f'but has {sorted(config)}')
    if isinstance(config['layers'], str) or not config['layers']:
        raise UserError(f'the layers of the group {config["name"]!r} must be a list of names, '
                        f'but they are {config["layers"]!r}')
    return AttentionGroup(
        name=config['name'],
        layers=[_as_pair(layer) for layer in config['layers']],
        loss=MODELS.build(dict(loss, loss_weight=config['weight'])))


def _as_pair(layer: Union[str, Sequence[str]]) -> Tuple[str, str]:
    """The names in student and teacher of a layer given by one name or by both."""
    if isinstance(layer, str):
        return layer, layer
    if len(layer) != 2 or not all(isinstance(name, str) for name in layer):
        raise UserError('a layer must be a name or a pair of names (in student and teacher), '
                        f'but is {layer!r}')
    return tuple(layer)

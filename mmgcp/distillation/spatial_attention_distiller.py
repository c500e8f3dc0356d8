# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Union

import torch.nn as nn
from mmdet.structures import OptSampleList, SampleList
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import MODELS

from .feature_recorder import FeatureRecorder
from .frozen_teacher import FrozenTeacher
from .groups import check_layers, connect_groups, layer_names, read_groups
from .head_responses import check_head, read_responses
from .weight_schedule import WeightSchedule

ADAPTERS = 'distill_adapters'


@MODELS.register_module()
class SpatialAttentionDistiller(BaseModel):
    """Train a pruned detector to look where the unpruned one looks: the spatial
    attention distilling of `GCP-SAD <https://arxiv.org/abs/2306.01526>`_.

    The total loss is that of the student plus, over the groups g and their layers l,

    .. math::
        \\sum_g w_g \\sum_l mean((A(F_l^{student}) - A(F_l^{teacher}))^2)

    with the attention maps A of :func:`mmgcp.distillation.spatial_attention`. The two
    features may differ in their number of channels. A group may have another loss, and the
    predictions of the two heads may be compared, too (``response``).

    To everything but training the distiller is its student: it has the student's
    modules, parameters and buffers under their own names, so its checkpoints,
    averaged ones included, are checkpoints of the student, and paramwise settings
    are those of the student. The teacher is no part of them (see
    :class:`mmgcp.distillation.FrozenTeacher`).

    Losses that compare channel with channel have adapters where the student has another
    number of them. These are trained: they are in ``parameters()`` and ``named_modules()``
    (and ``children()``) below ``distill_adapters``, where optimizers, devices and distributed
    training find them. They are neither in the ``state_dict()`` nor among the student's
    modules. So that they go on, too, when training is resumed, add
    :class:`mmgcp.distillation.DistillAdapterHook` to the ``custom_hooks``.

    .. code-block:: python

        model = dict(
            type='mmgcp.SpatialAttentionDistiller',
            student=_base_.model,
            teacher=dict(config='baseline.py', checkpoint='baseline.pth'),
            groups=[
                dict(name='backbone', weight=1e2, layers='backbone_outputs'),
                dict(name='neck', weight=1., layers='neck_outputs',
                     loss=dict(type='mmgcp.ChannelWiseLoss', tau=1.)),
            ],
            response=dict(type='mmgcp.ResponseLoss', temperature=3.),
            schedule=dict(warmup=1, decay='cosine', stop_epoch=40))

    Args:
        student (dict): Config of the student's model.
        teacher (dict): ``config``, a config file or the config of a model, and
            ``checkpoint``, a file. Relative paths start at the working directory.
        groups (str | Sequence[dict]): For each group its ``name``, ``weight`` and
            ``layers``, names as in ``named_modules()``; a pair of names stands for
            a layer whose name differs between student and teacher. ``layers`` may also be
            'backbone_outputs' or 'neck_outputs': the modules that emit the outputs of that
            part (see :func:`mmgcp.distillation.find_part_outputs`), output by output. A group
            may have a ``loss`` of its own. 'auto' stands for the two groups 'backbone' and
            'neck' of these layers with the weights 1e2 and 1, which are a ten-thousandth of the
            paper's 1e6 for the backbone and 1e4 for the finer of its other layers: the paper's
            exceed the detection loss of MMYOLO by far, and ten times these harmed a hard
            pruned network (docs/results.md). May be empty if there is a ``response``.
            Defaults to 'auto'.
        loss (dict): Config of the loss of a layer in the groups without one of their own,
            built with the group's weight as ``loss_weight``.
            Defaults to dict(type='mmgcp.SpatialAttentionLoss').
        response (dict, optional): Config of the loss between the predictions of the heads,
            which must be MMYOLO's. Defaults to None.
        schedule (dict, optional): How the weights of all of it change in the course of
            training, the arguments of :class:`mmgcp.distillation.WeightSchedule`.
            Defaults to None: they do not.

    Raises:
        UserError: The teacher's config or checkpoint does not exist, they do not fit
            each other, the student or the teacher lacks a layer, or a setting is wrong.
        TypeError: The student is no detector.
    """

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 groups: Union[str, Sequence[dict]] = 'auto',
                 loss: dict = dict(type='mmgcp.SpatialAttentionLoss'),
                 response: Optional[dict] = None,
                 schedule: Optional[dict] = None):
        # All before anything is loaded: a mistake shall not cost the wait.
        groups = read_groups(groups, loss)
        if not groups and response is None:
            raise UserError('groups must not be empty: there would be nothing to distil')
        response = None if response is None else MODELS.build(response)
        schedule = _build_schedule(schedule or {})
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
        check_layers(groups, student, 0, 'student')
        self._teacher = FrozenTeacher(**teacher)
        check_layers(groups, self.teacher, 1, 'teacher')
        if response is not None:
            check_head(student, 'student')
            check_head(self.teacher, 'teacher')
        self.groups = connect_groups(groups, student, self.teacher)
        # Past nn.Module, which would make these the student's
        self.__dict__['response'] = response
        self.__dict__[ADAPTERS] = nn.ModuleList(
            adapter for group in self.groups for adapter in group.adapters)
        self.schedule = schedule
        self._adapters_are_new = True
        self._left_alone: Set[str] = set()

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
        """The student's losses, ``loss_<kind>_<name>`` of each group, and those of the
        response.

        The kind is 'attention' for :class:`mmgcp.distillation.SpatialAttentionLoss`. From
        the schedule's stop epoch on there are the student's only, and the teacher does not
        run.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            data_samples (list[DetDataSample] | dict): What the student takes.

        Returns:
            dict[str, Tensor]: The losses.
        """
        self._tell_of_new_adapters()
        factor = self.schedule.current_factor()
        if factor is None:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
            losses.update(self._idle_losses())
            return losses
        teacher_features, teacher_outputs = self._teacher.features_and_outputs(
            inputs, layer_names(self.groups, 1))
        with self._record_student() as (features, outputs):
            losses = dict(self.student(inputs, data_samples, mode='loss'))
        extra = {group.loss_name: group.compute(features, teacher_features)
                 for group in self.groups}
        if self.response is not None:
            extra.update(self.response(
                read_responses(self.student.bbox_head, *outputs),
                read_responses(self.teacher.bbox_head, teacher_outputs)))
        losses.update((name, factor * value) for name, value in extra.items())
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

    def named_modules(self,
                      memo: Optional[Set[nn.Module]] = None,
                      prefix: str = '',
                      remove_duplicate: bool = True) -> Iterator[Tuple[str, nn.Module]]:
        """The student's modules and, behind them, the adapters if there are any."""
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)
        if self._has_adapters():
            name = f'{prefix}.{ADAPTERS}' if prefix else ADAPTERS
            yield from self.distill_adapters.named_modules(memo, name, remove_duplicate)

    def named_children(self) -> Iterator[Tuple[str, nn.Module]]:
        """The student's children and the adapters if there are any."""
        yield from super().named_children()
        if self._has_adapters():
            yield ADAPTERS, self.distill_adapters

    def add_module(self, name: str, module: Optional[nn.Module]) -> None:
        """Add a module to the student.

        Those who convert a model put each of its children back this way. The adapters stay
        outside the student's modules then.
        """
        if name == ADAPTERS:
            self.__dict__[ADAPTERS] = module
        else:
            super().add_module(name, module)

    def load_adapters(self, state: Dict[str, Tensor]) -> None:
        """Load what ``distill_adapters.state_dict()`` returned.

        Args:
            state (dict[str, Tensor]): The weights of all adapters.
        """
        self.distill_adapters.load_state_dict(state)
        self._adapters_are_new = False

    def _has_adapters(self) -> bool:
        return len(self.__dict__.get(ADAPTERS, ())) > 0

    def _tell_of_new_adapters(self) -> None:
        """Warn if a resumed training begins with new adapters."""
        iteration = MessageHub.get_current_instance().get_info('iter', 0)
        if self._has_adapters() and self._adapters_are_new and iteration > 0:
            warnings.warn(f'the training goes on from iteration {iteration}, but the adapters of '
                          'its distilling begin anew; mmgcp.DistillAdapterHook keeps them')
        self._adapters_are_new = False

    def _idle_losses(self) -> Dict[str, Tensor]:
        """Zeros that depend on the adapters.

        Distributed training waits for gradients of all parameters.
        """
        return {group.loss_name: 0 * sum(param.sum() for adapter in group.adapters
                                         for param in adapter.parameters())
                for group in self.groups if group.adapters}

    @contextmanager
    def _record_student(self) -> Iterator[Tuple[Dict[str, Tensor], List[Any]]]:
        """Record the student's features and, for the response, what its head returns."""
        outputs: List[Any] = []
        handle = None
        if self.response is not None:
            handle = self.student.bbox_head.head_module.register_forward_hook(
                lambda module, args, output: outputs.append(output))
        try:
            with FeatureRecorder(self.student, layer_names(self.groups, 0), 'student',
                                 self._left_alone) as features:
                yield features, outputs
        finally:
            if handle is not None:
                handle.remove()


def _build_schedule(config: dict) -> WeightSchedule:
    try:
        return WeightSchedule(**config)
    except TypeError:
        raise UserError("schedule may have the keys 'warmup', 'decay', 'final_factor' and "
                        f"'stop_epoch', but is {dict(config)}") from None

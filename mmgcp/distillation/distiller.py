# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings
from typing import Dict, Optional, Sequence, Union

import torch.nn as nn
from mmdet.structures import OptSampleList, SampleList
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.nn.hooks import recording
from mmgcp.registry import MODELS

from .features import FeatureRecorder, FrozenTeacher
from .groups import check_layers, connect_groups, layer_names, read_groups
from .response_loss import check_head, read_responses
from .student_proxy import StudentProxy
from .weight_schedule import WeightSchedule, build_schedule

HEAD = 'bbox_head.head_module'


@MODELS.register_module()
class SpatialAttentionDistiller(StudentProxy):
    """Train a pruned detector to look where the unpruned one looks: the spatial
    attention distillation of `GCP-SAD <https://arxiv.org/abs/2306.01526>`_.

    The total loss is that of the student plus, over the groups g and their layers l,

    .. math::
        \\sum_g w_g \\sum_l mean((A(F_l^{student}) - A(F_l^{teacher}))^2)

    with the attention maps A of :func:`mmgcp.distillation.spatial_attention`. The two
    features may differ in their number of channels. A group may have another loss, and the
    predictions of the two heads may be compared as well (``response``).

    To everything but training, the distiller is its student (see
    :class:`mmgcp.distillation.student_proxy.StudentProxy`): its checkpoints, averaged ones
    included, are checkpoints of the student, and paramwise settings of the optimizer are those
    of the student. The teacher is not part of it (see :class:`mmgcp.distillation.FrozenTeacher`).

    Losses that compare channel with channel have adapters where student and teacher have
    different numbers of them. The adapters are trained below the name ``distill_adapters``,
    but are not in the ``state_dict()``. To keep them when training is resumed, add
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
            response=dict(type='mmgcp.ResponseLoss', temperature=3.))

    Args:
        student (dict): Config of the student, any detector.
        teacher (dict): ``config`` and ``checkpoint`` of the teacher; see
            :class:`mmgcp.distillation.FrozenTeacher`.
        groups (str | Sequence[dict]): Groups of layers, each with ``name``, ``weight`` and
            ``layers``, which are names as in ``named_modules()``; a pair of names stands for
            a layer whose name differs between student and teacher. ``layers`` may also be
            'backbone_outputs' or 'neck_outputs': the modules that emit the outputs of that
            part (see :func:`mmgcp.distillation.find_part_outputs`), output by output. A group
            may have a ``loss`` of its own. 'auto' stands for two groups 'backbone' and
            'neck' of these layers with the weights 1e2 and 1. They are a ten-thousandth of the
            paper's 1e6 for the backbone and 1e4 for the finer one of its other groups: the
            paper's weights exceed the detection loss of MMYOLO by far, and ten times these
            harmed a heavily pruned network (docs/results.md). May be empty if there is a
            ``response``. Defaults to 'auto'.
        loss (dict): Config of the loss for groups without one of their own; it is built for
            each layer with the group's weight as ``loss_weight``.
            Defaults to dict(type='mmgcp.SpatialAttentionLoss').
        response (dict, optional): Config of the loss between the predictions of the heads,
            which must be MMYOLO's. Defaults to None.
        schedule (dict, optional): How all these weights change in the course of the training:
            the arguments of :class:`mmgcp.distillation.WeightSchedule`.
            Defaults to None, which means not at all.

    Raises:
        UserError: The teacher's config or checkpoint does not exist, they do not fit
            each other, the student is not a detector, the student or the teacher lacks a
            layer, or a setting is wrong.
    """

    def __init__(self,
                 student: dict,
                 teacher: dict,
                 groups: Union[str, Sequence[dict]] = 'auto',
                 loss: dict = dict(type='mmgcp.SpatialAttentionLoss'),
                 response: Optional[dict] = None,
                 schedule: Optional[dict] = None):
        # The settings are checked before the models are built and the teacher is loaded.
        groups = read_groups(groups, loss)
        if not groups and response is None:
            raise UserError('groups must not be empty: there would be nothing to distil')
        response = None if response is None else MODELS.build(response)
        schedule = build_schedule(schedule or {})
        if set(teacher) != {'config', 'checkpoint'}:
            raise UserError("teacher must have the keys 'config' and 'checkpoint', "
                            f'but has {sorted(teacher)}')
        student = MODELS.build(student)
        if not isinstance(student, BaseModel):
            raise UserError(f'student must be a detector, but is a {type(student).__name__}')
        super().__init__(student)
        check_layers(groups, student, 0, 'student')
        self._teacher = FrozenTeacher(**teacher)
        check_layers(groups, self.teacher, 1, 'teacher')
        if response is not None:
            check_head(student, 'student')
            check_head(self.teacher, 'teacher')
        self.groups = connect_groups(groups, student, self.teacher)
        self.set_adapters(nn.ModuleList(
            adapter for group in self.groups for adapter in group.adapters))
        self._recorder = FeatureRecorder(student, layer_names(self.groups, 0), 'student')
        self._teacher.record_features(layer_names(self.groups, 1))
        object.__setattr__(self, 'response', response)
        self.schedule: WeightSchedule = schedule
        self._adapters_are_new = True

    @property
    def teacher(self) -> nn.Module:
        """nn.Module: The teacher's detector, in eval mode and without gradients."""
        return self._teacher.module

    def forward(self,
                inputs: Tensor,
                data_samples: OptSampleList = None,
                mode: str = 'tensor') -> Union[Dict[str, Tensor], list, tuple, Tensor]:
        """Run the student and, for the losses, the teacher.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            data_samples (list[DetDataSample] | dict, optional): The ground truth in the form
                that the student takes. Defaults to None.
            mode (str): 'loss' for :meth:`loss`, 'predict' and 'tensor' for the
                student's outputs. Defaults to 'tensor'.

        Returns:
            dict | list | tuple | Tensor: As the student's, depending on the mode.
        """
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.student(inputs, data_samples, mode=mode)

    def loss(self, inputs: Tensor, data_samples: Union[SampleList, dict]) -> Dict[str, Tensor]:
        """Compute the student's losses and those of the distillation.

        Each group has a loss ``loss_<kind>_<name>``, where the kind is 'attention' for
        :class:`mmgcp.distillation.SpatialAttentionLoss`. From the schedule's stop epoch on
        there are only the student's losses, and the teacher does not run.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            data_samples (list[DetDataSample] | dict): The ground truth in the form that the
                student takes.

        Returns:
            dict[str, Tensor]: The losses.
        """
        self._warn_of_new_adapters()
        factor = self.schedule.current_factor()
        if factor is None:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
            losses.update(self._idle_losses())
            return losses
        teacher_features, teacher_outputs = self._teacher.run(inputs)
        heads = [] if self.response is None else [HEAD]
        with self._recorder.record() as features, \
                recording(self.student, heads, copy=False) as outputs:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
        extra = {group.loss_name: group.compute(features, teacher_features)
                 for group in self.groups}
        if self.response is not None:
            extra.update(self.response(
                read_responses(self.student.bbox_head, *outputs[HEAD]),
                read_responses(self.teacher.bbox_head, teacher_outputs)))
        losses.update((name, factor * value) for name, value in extra.items())
        return losses

    def load_adapters(self, state: Dict[str, Tensor]) -> None:
        """Load the weights of the adapters.

        Args:
            state (dict[str, Tensor]): What ``distill_adapters.state_dict()`` returned.
        """
        self.distill_adapters.load_state_dict(state)
        self._adapters_are_new = False

    def _warn_of_new_adapters(self) -> None:
        """Warn if a resumed training starts with new adapters."""
        iteration = MessageHub.get_current_instance().get_info('iter', 0)
        if self.has_adapters() and self._adapters_are_new and iteration > 0:
            warnings.warn(f'training resumes at iteration {iteration}, but with new adapters for '
                          'the distillation; mmgcp.DistillAdapterHook would have kept them')
        self._adapters_are_new = False

    def _idle_losses(self) -> Dict[str, Tensor]:
        """Losses of zero that depend on the adapters.

        Distributed training waits for the gradients of all parameters.
        """
        return {group.loss_name: 0 * sum(param.sum() for adapter in group.adapters
                                         for param in adapter.parameters())
                for group in self.groups if group.adapters}

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import warnings
from contextlib import nullcontext
from typing import ContextManager, Dict, List, Optional, Sequence, Union

import torch.nn as nn
from mmdet.structures import OptSampleList, SampleList
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from torch import Tensor

from mmgcp.errors import UserError, shown
from mmgcp.registry import MODELS, build_model
from mmgcp.utils.checks import CONFIG, MAPPING, checked

from .features import FeatureRecorder, FrozenTeacher
from .groups import check_layers, connect_groups, layer_names, read_groups
from .head_loss import HeadLoss, build_head_losses
from .responses import recording_head
from .student_proxy import StudentProxy
from .weight_schedule import WeightSchedule, build_schedule


@MODELS.register_module()
class SpatialAttentionDistiller(StudentProxy):
    r"""Train a pruned detector to look where the unpruned one looks.

    This is the spatial attention distillation of `GCP-SAD <https://arxiv.org/abs/2306.01526>`_.
    The total loss is that of the student plus, over the groups g and their layers l,

    .. math::
        \sum_g w_g \sum_l mean((A(F_l^{student}) - A(F_l^{teacher}))^2)

    with the attention maps A of :func:`mmgcp.distillation.spatial_attention`. The two
    features may differ in their number of channels. A group may have another loss, and the
    predictions of the two heads may be compared as well (``response``).

    To everything but training, the distiller is its student (see
    :class:`mmgcp.distillation.student_proxy.StudentProxy`): its checkpoints, averaged ones
    included, are checkpoints of the student, and paramwise settings of the optimizer are those
    of the student. The teacher is not part of it (see :class:`mmgcp.distillation.FrozenTeacher`).

    Losses that compare channel with channel, and the one that lets the teacher's head read the
    student's features, have adapters where student and teacher have different numbers of channels.
    The adapters are trained below the name ``distill_adapters``, but are not in the
    ``state_dict()``. To keep them when training is resumed, add
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
        loss (dict, optional): Config of the loss for groups without one of their own; it is
            built for each layer with the group's weight as ``loss_weight``.
            Defaults to dict(type='mmgcp.SpatialAttentionLoss').
        response (dict | Sequence[dict], optional): Config of a loss between the predictions of
            the heads, or several of different types: :class:`mmgcp.distillation.ResponseLoss`,
            :class:`mmgcp.distillation.LocalizationLoss` and
            :class:`mmgcp.distillation.CrossHeadLoss`. The heads must be MMYOLO's, or
            MMDetection's GFLHead. Defaults to None.
        schedule (dict, optional): How all these weights change in the course of the training:
            the arguments of :class:`mmgcp.distillation.WeightSchedule`.
            Defaults to None, which means not at all.

    Raises:
        UserError: The teacher's config or checkpoint does not exist, they do not fit
            each other, the student is not a detector, the student or the teacher lacks a
            layer, or a setting is wrong.
    """

    @checked(student=CONFIG, teacher=MAPPING, loss=CONFIG, schedule=MAPPING)
    def __init__(self,
                 student: dict,
                 teacher: dict,
                 groups: Union[str, Sequence[dict]] = 'auto',
                 loss: Optional[dict] = None,
                 response: Union[dict, Sequence[dict], None] = None,
                 schedule: Optional[dict] = None):
        # The settings are checked before the models are built and the teacher is loaded.
        groups = read_groups(groups, loss or dict(type='mmgcp.SpatialAttentionLoss'))
        responses = build_head_losses(response)
        if not groups and not responses:
            raise UserError('groups must not be empty: there would be nothing to distil')
        schedule = build_schedule(schedule or {})
        if set(teacher) != {'config', 'checkpoint'}:
            raise UserError("teacher must have the keys 'config' and 'checkpoint', "
                            f'but has {shown(sorted(teacher, key=str))}')
        student = build_model(MODELS, student, 'student')
        if not isinstance(student, BaseModel):
            raise UserError(f'student must be a detector, but is a {type(student).__name__}')
        super().__init__(student)
        check_layers(groups, student, 0, 'student')
        self._teacher = FrozenTeacher(**teacher)
        check_layers(groups, self.teacher, 1, 'teacher')
        for response_loss in responses:
            response_loss.connect(student, self.teacher)
        self.groups = connect_groups(groups, student, self.teacher)
        self.responses: List[HeadLoss] = responses
        self.set_adapters(nn.ModuleList(
            adapter for part in (*self.groups, *responses) for adapter in part.adapters))
        self._recorder = FeatureRecorder(student, layer_names(self.groups, 0), 'student')
        self._teacher.record_features(layer_names(self.groups, 1))
        if responses:
            self._teacher.record_head(self._head_layers(1))
        self.schedule: WeightSchedule = schedule
        self._adapters_are_new = True

    @property
    def teacher(self) -> nn.Module:
        """The teacher's detector, in eval mode and without gradients."""
        return self._teacher.module

    def forward(self,
                inputs: Tensor,
                data_samples: OptSampleList = None,
                mode: str = 'tensor') -> Union[Dict[str, Tensor], list, tuple, Tensor]:
        """Run the student on preprocessed images (N, C, H, W).

        Args:
            inputs (Tensor): The images.
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
        """
        self._warn_of_new_adapters()
        factor = self.schedule.current_factor()
        if factor is None:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
            losses.update(self._idle_losses())
            return losses
        teacher_features, teacher_head = self._teacher.run(inputs)
        with self._recorder.record() as features, self._record_head() as head:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
        extra = {group.loss_name: group.compute(features, teacher_features)
                 for group in self.groups}
        for loss in self.responses:
            extra.update(loss.compare(head, teacher_head))
        losses.update((name, factor * value) for name, value in extra.items())
        return losses

    def _head_layers(self, side: int) -> List[str]:
        """List the layers of the student's head (side 0) or the teacher's (1) to be recorded."""
        return [pair[side] for loss in self.responses for pair in loss.layers]

    def _record_head(self) -> ContextManager:
        """Record the student's head if its predictions are compared."""
        return recording_head(self.student, self._head_layers(0)) if self.responses else (
            nullcontext())

    def load_adapters(self, state: Dict[str, Tensor]) -> None:
        """Load what ``distill_adapters.state_dict()`` returned."""
        self.distill_adapters.load_state_dict(state)
        self._adapters_are_new = False

    def _warn_of_new_adapters(self) -> None:
        """Warn if a resumed training starts with new adapters."""
        iteration = MessageHub.get_current_instance().runtime_info.get('iter', 0)
        if self.has_adapters() and self._adapters_are_new and iteration > 0:
            warnings.warn(f'training resumes at iteration {iteration}, but with new adapters for '
                          'the distillation; mmgcp.DistillAdapterHook would have kept them',
                          stacklevel=2)
        self._adapters_are_new = False

    def _idle_losses(self) -> Dict[str, Tensor]:
        """Return losses of zero that depend on the adapters.

        Distributed training waits for the gradients of all parameters.
        """
        return {part.loss_name: 0 * sum(param.sum() for adapter in part.adapters
                                        for param in adapter.parameters())
                for part in (*self.groups, *self.responses) if part.adapters}

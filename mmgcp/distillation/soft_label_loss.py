# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The teacher's predictions as soft labels."""
from functools import partial
from typing import Dict, Optional

from torch import Tensor

from mmgcp.registry import MODELS
from mmgcp.utils.checks import MAPPING, checked

from .head_loss import HeadLoss
from .response_loss import binary_kl_divergence, box_difference
from .responses import Responses, check_same


@MODELS.register_module()
class SoftLabelLoss(HeadLoss):
    r"""The teacher's predictions as labels, each counted by how confident the teacher is of it.

    In place of annotations, or beside them. Of the teacher's prediction i, o_i is the
    objectness (1 if the head has none), and c_i the best class score times o_i. All parts are
    sums over the predictions of all images, divided by Z = max(1, \sum_i c_i), the number of
    objects that the teacher sees, as losses of annotations are divided by the number of positives
    (`arXiv 1708.02002 <https://arxiv.org/abs/1708.02002>`_, section 4.1):

    - ``obj``: the divergence of the objectnesses (:func:`binary_kl_divergence`).
    - ``cls``: o_i times the divergence of the class scores, summed over the classes.
    - ``box``: c_i times one minus the IoU of the decoded boxes, where the teacher's has an area.

    The divergences are those from soft labels of `arXiv 1503.02531
    <https://arxiv.org/abs/1503.02531>`_ with the temperature 1. Differences of raw scores far
    below zero, of which nothing is ever seen, hence do not count.

    Args:
        weights (dict, optional): Multipliers of ``obj``, ``cls`` and ``box``; 1, 1 and 2 for
            those that are left out. A part with the weight 0 is not computed. Defaults to None.

    Raises:
        UserError: There is no such part, or a multiplier is not allowed.
    """
    kind = 'soft_label'
    parts = dict(obj=1., cls=1., box=2.)

    @checked(weights=MAPPING)
    def __init__(self, weights: Optional[Dict[str, float]] = None):
        super().__init__(weights)

    def forward(self, student: Responses, teacher: Responses) -> Dict[str, Tensor]:
        """Compare the predictions of student and teacher for the same images.

        Returns ``loss_soft_label_cls``, ``loss_soft_label_box`` and, if the heads have
        objectnesses, ``loss_soft_label_obj``. Raises a UserError if the predictions do not
        correspond.
        """
        check_same(student, teacher)
        objects = teacher.confidences.sum().clamp(min=1)
        losses = dict(obj=_objectness_loss, cls=_class_loss, box=_box_loss)
        if student.objectnesses is None:
            losses.pop('obj')
        sums = self._weighted({part: partial(loss, student, teacher)
                               for part, loss in losses.items()})
        return {name: value / objects for name, value in sums.items()}


def _objectness_loss(student: Responses, teacher: Responses) -> Tensor:
    return binary_kl_divergence(student.objectnesses, teacher.objectnesses).sum()


def _class_loss(student: Responses, teacher: Responses) -> Tensor:
    divergences = binary_kl_divergence(student.scores, teacher.scores).sum(-1)
    if teacher.objectnesses is not None:
        divergences = divergences * teacher.objectnesses.sigmoid()
    return divergences.sum()


def _box_loss(student: Responses, teacher: Responses) -> Tensor:
    starts, ends = teacher.boxes.chunk(2, dim=-1)
    some = (ends > starts).all(-1)  # no box overlaps with one of no area
    differences = box_difference(student.boxes[some], teacher.boxes[some], 'iou')
    return (teacher.confidences[some] * differences).sum()

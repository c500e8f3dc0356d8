# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss between the predictions of two heads."""
from functools import partial
from typing import Dict, Optional

import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from mmgcp.registry import MODELS
from mmgcp.utils.checks import MAPPING, SHARE, checked, one_of

from .head_loss import TEMPERATURE, HeadLoss, mean_of
from .responses import Responses, check_same

BOX_LOSSES = ('iou', 'giou', 'l2')


@MODELS.register_module()
class ResponseLoss(HeadLoss):
    """Difference between the predictions of the student's head and those of the teacher's.

    It follows the response distillation in the public code of `GCP-SAD
    <https://arxiv.org/abs/2306.01526>`_, with the temperature of `arXiv 1503.02531
    <https://arxiv.org/abs/1503.02531>`_:

    - ``cls``: the divergence of the class scores (:func:`binary_kl_divergence`), summed
      over the classes. If the head has objectnesses, it is averaged over the positives,
      otherwise over all predictions, because the scores then also say where no object is.
    - ``obj``: the divergence of the objectnesses, averaged over all predictions.
    - ``box``: the difference of the decoded boxes, averaged over the positives.

    Positives are the predictions that the teacher is confident of. This deviates from the
    authors' code, which takes the anchors that ground truths are assigned to: assigners
    differ from detector to detector, confidences do not. The divergences are binary because
    the detectors' scores are sigmoids; the authors take a softmax.

    Args:
        temperature (float): Divisor of the raw scores. Defaults to 3.0.
        weights (dict, optional): Multipliers of ``cls``, ``obj`` and ``box``, 1 for those
            that are left out; a part with the weight 0 is not computed. Defaults to None.
        box_loss (str): ``'giou'`` or ``'iou'`` for one minus that overlap, or ``'l2'`` for
            the squared difference of the corners in units of the level's stride, averaged
            over the four coordinates. Defaults to 'giou'.
        score_thr (float): A prediction is a positive if the teacher's best class score,
            times the objectness if there is one, is above it. Defaults to 0.1.

    Raises:
        UserError: A setting is wrong.
    """
    kind = 'response'
    parts = dict(cls=1., obj=1., box=1.)

    @checked(temperature=TEMPERATURE, weights=MAPPING, box_loss=one_of(*BOX_LOSSES),
             score_thr=SHARE)
    def __init__(self,
                 temperature: float = 3.0,
                 weights: Optional[Dict[str, float]] = None,
                 box_loss: str = 'giou',
                 score_thr: float = 0.1):
        super().__init__(weights)
        self.temperature = temperature
        self.box_loss = box_loss
        self.score_thr = score_thr

    def forward(self, student: Responses, teacher: Responses) -> Dict[str, Tensor]:
        """Compare the predictions of student and teacher for the same images.

        Returns ``loss_response_cls``, ``loss_response_box`` and, if the heads have objectnesses,
        ``loss_response_obj``. Raises a UserError if the predictions do not correspond.
        """
        check_same(student, teacher)
        positives = teacher.confidences > self.score_thr
        losses = dict(cls=self._class_loss, obj=self._objectness_loss, box=self._box_loss)
        if student.objectnesses is None:
            losses.pop('obj')
        return self._weighted({part: partial(loss, student, teacher, positives)
                               for part, loss in losses.items()})

    def _class_loss(self, student: Responses, teacher: Responses, positives: Tensor) -> Tensor:
        divergence = binary_kl_divergence(student.scores, teacher.scores, self.temperature).sum(-1)
        if student.objectnesses is None:
            return divergence.mean()
        return mean_of(divergence[positives])

    def _objectness_loss(self, student: Responses, teacher: Responses,
                         positives: Tensor) -> Tensor:
        return binary_kl_divergence(
            student.objectnesses, teacher.objectnesses, self.temperature).mean()

    def _box_loss(self, student: Responses, teacher: Responses, positives: Tensor) -> Tensor:
        boxes, targets = student.boxes[positives], teacher.boxes[positives]
        if self.box_loss == 'l2':
            strides = student.strides.expand_as(positives)[positives]
            return mean_of(((boxes - targets) / strides[:, None]).square().mean(-1))
        return mean_of(box_difference(boxes, targets, self.box_loss))


def binary_kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.) -> Tensor:
    """Kullback-Leibler divergence of Bernoulli distributions, from raw scores.

    With p = sigmoid(teacher / T) and q = sigmoid(student / T) it is T² · (p log(p / q) +
    (1 - p) log((1 - p) / (1 - q))), where the factor T² keeps its gradients from shrinking
    with the temperature (`arXiv 1503.02531 <https://arxiv.org/abs/1503.02531>`_, section 2).
    Raw scores, from before the sigmoid, may have any shape; the divergence of each is returned.
    """
    student, teacher = student / temperature, teacher / temperature
    positive = F.logsigmoid(teacher) - F.logsigmoid(student)
    negative = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return temperature**2 * (teacher.sigmoid() * positive + (-teacher).sigmoid() * negative)


def box_difference(boxes: Tensor, targets: Tensor, overlap: str = 'giou') -> Tensor:
    """Return one minus the overlap, ``'iou'`` or ``'giou'``, for boxes (M, 4) and (M, 4)."""
    return 1 - bbox_overlaps(_well_formed(boxes), _well_formed(targets), overlap, is_aligned=True)


def _well_formed(boxes: Tensor) -> Tensor:
    """Make boxes (M, 4) that end before they begin empty.

    Heads that predict unbounded distances can emit such boxes, and overlaps of negative areas
    are meaningless.
    """
    starts, ends = boxes.chunk(2, dim=-1)
    return torch.cat((starts, torch.max(starts, ends)), dim=-1)

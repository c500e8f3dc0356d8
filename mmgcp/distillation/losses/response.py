# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict, Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from mmgcp.distillation.head_responses import Responses
from mmgcp.errors import UserError
from mmgcp.registry import MODELS

BOX_LOSSES = ('iou', 'giou', 'l2')


@MODELS.register_module()
class ResponseLoss(nn.Module):
    """Draw the predictions of a student's head to those of its teacher's.

    After the response distilling in the public code of `GCP-SAD
    <https://arxiv.org/abs/2306.01526>`_, with the temperature of `arXiv 1503.02531
    <https://arxiv.org/abs/1503.02531>`_:

    - ``cls``: the divergence of the class scores (:func:`binary_kl_divergence`), summed
      over the classes. If the head has objectnesses, it is averaged over the positives,
      else over all predictions, for the scores say then where nothing is, too.
    - ``obj``: the divergence of the objectnesses, averaged over all predictions.
    - ``box``: the difference of the decoded boxes, averaged over the positives.

    Positives are the predictions that the teacher is confident of. That deviates from the
    authors' code, which takes the anchors that a ground truth is assigned to: assigners
    differ from detector to detector, confidences do not. The divergences are binary since
    the detectors' scores are sigmoids; the authors take a softmax.

    Args:
        temperature (float): Divisor of the raw scores. Defaults to 3.0.
        weights (dict, optional): Multiplier of ``cls``, ``obj`` and ``box``; one that is
            left out is 1, and a part of weight 0 is not computed. Defaults to None.
        box_loss (str): ``'giou'`` or ``'iou'`` for one minus that overlap, or ``'l2'`` for
            the squared difference of the corners in units of the level's stride, averaged
            over the four coordinates. Defaults to 'giou'.
        score_thr (float): A prediction is a positive if the teacher's best class score,
            times the objectness if there is one, is above it. Defaults to 0.1.
    """

    def __init__(self,
                 temperature: float = 3.0,
                 weights: Optional[Dict[str, float]] = None,
                 box_loss: str = 'giou',
                 score_thr: float = 0.1):
        super().__init__()
        if not temperature > 0:
            raise UserError(f'temperature must be positive, but is {temperature}')
        if box_loss not in BOX_LOSSES:
            raise UserError(f'box_loss must be one of {BOX_LOSSES}, but is {box_loss!r}')
        self.weights = dict(cls=1., obj=1., box=1.)
        unknown = set(weights or {}) - set(self.weights)
        if unknown:
            raise UserError("weights may have the keys 'cls', 'obj' and 'box', "
                            f'but has {sorted(unknown)}')
        self.weights.update(weights or {})
        self.temperature = temperature
        self.box_loss = box_loss
        self.score_thr = score_thr

    def forward(self, student: Responses, teacher: Responses) -> Dict[str, Tensor]:
        """Compare the predictions for the same images.

        Args:
            student (Responses): The student's.
            teacher (Responses): The teacher's, which must be as many.

        Returns:
            dict[str, Tensor]: ``loss_response_cls``, ``loss_response_box`` and, if the
            heads have objectnesses, ``loss_response_obj``.

        Raises:
            UserError: The heads do not predict the same.
        """
        _check_same(student, teacher)
        positives = teacher.confidences > self.score_thr
        losses = dict(cls=self._class_loss, obj=self._objectness_loss, box=self._box_loss)
        if student.objectnesses is None:
            losses.pop('obj')
        return {
            f'loss_response_{name}': self.weights[name] * loss(student, teacher, positives)
            for name, loss in losses.items() if self.weights[name]
        }

    def _class_loss(self, student: Responses, teacher: Responses, positives: Tensor) -> Tensor:
        divergence = binary_kl_divergence(student.scores, teacher.scores, self.temperature).sum(-1)
        if student.objectnesses is None:
            return divergence.mean()
        return _mean_of(divergence[positives])

    def _objectness_loss(self, student: Responses, teacher: Responses,
                         positives: Tensor) -> Tensor:
        return binary_kl_divergence(
            student.objectnesses, teacher.objectnesses, self.temperature).mean()

    def _box_loss(self, student: Responses, teacher: Responses, positives: Tensor) -> Tensor:
        boxes, targets = student.boxes[positives], teacher.boxes[positives]
        if self.box_loss == 'l2':
            strides = student.strides.expand_as(positives)[positives]
            return _mean_of(((boxes - targets) / strides[:, None]).square().mean(-1))
        overlaps = bbox_overlaps(
            _well_formed(boxes), _well_formed(targets), self.box_loss, is_aligned=True)
        return _mean_of(1 - overlaps)


def binary_kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.) -> Tensor:
    """Kullback-Leibler divergence of Bernoulli distributions from raw scores.

    With p = sigmoid(teacher / T) and q = sigmoid(student / T) it is T² · (p log(p / q) +
    (1 - p) log((1 - p) / (1 - q))), so that its gradients do not shrink with the
    temperature (`arXiv 1503.02531 <https://arxiv.org/abs/1503.02531>`_, section 2).

    Args:
        student (Tensor): Raw scores (before the sigmoid) of any shape.
        teacher (Tensor): Raw scores of the same shape.
        temperature (float): T. Defaults to 1.0.

    Returns:
        Tensor: The divergence of each score, of the same shape.
    """
    student, teacher = student / temperature, teacher / temperature
    positive = F.logsigmoid(teacher) - F.logsigmoid(student)
    negative = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return temperature**2 * (teacher.sigmoid() * positive + (-teacher).sigmoid() * negative)


def _mean_of(values: Tensor) -> Tensor:
    """The mean, or 0 of no values."""
    return values.sum() / max(len(values), 1)


def _well_formed(boxes: Tensor) -> Tensor:
    """Boxes (M, 4) none of which ends before it begins.

    A head that predicts distances without a bound can make such boxes, and the overlap of
    negative areas is any number.
    """
    starts, ends = boxes.chunk(2, dim=-1)
    return torch.cat((starts, torch.max(starts, ends)), dim=-1)


def _check_same(student: Responses, teacher: Responses) -> None:
    shapes = tuple(student.scores.shape), tuple(teacher.scores.shape)
    if shapes[0] != shapes[1]:
        raise UserError('the heads of student and teacher must make the same predictions, but '
                        f'their scores (images, predictions, classes) are {shapes[0]} and '
                        f'{shapes[1]}')
    if (student.objectnesses is None) != (teacher.objectnesses is None):
        raise UserError('the heads of student and teacher must both have objectnesses or both '
                        'have none')

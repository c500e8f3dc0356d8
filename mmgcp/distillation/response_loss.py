# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The predictions of MMYOLO's heads in one form, and the loss between two of them."""
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import MODELS

BOX_LOSSES = ('iou', 'giou', 'l2')


@dataclass
class Responses:
    """P predictions for each of N images, level by level, in single precision.

    Attributes:
        scores (Tensor): Raw class scores (N, P, num_classes).
        boxes (Tensor): Decoded boxes (N, P, 4) as (x1, y1, x2, y2) in pixels.
        objectnesses (Tensor, optional): Raw objectnesses (N, P).
        strides (Tensor): Stride (P, ) of the predictions in pixels.
    """
    scores: Tensor
    boxes: Tensor
    objectnesses: Optional[Tensor]
    strides: Tensor

    @property
    def confidences(self) -> Tensor:
        """Tensor: Best class score times objectness (N, P)."""
        confidences = self.scores.max(-1).values.sigmoid()
        if self.objectnesses is not None:
            confidences = confidences * self.objectnesses.sigmoid()
        return confidences


def check_head(model: nn.Module, owner: str) -> None:
    """Check that :func:`read_responses` can read the head of a detector.

    Args:
        model (nn.Module): The detector.
        owner (str): What to call it in error messages.

    Raises:
        UserError: Its head is not one of MMYOLO's.
    """
    head = getattr(model, 'bbox_head', None)
    parts = ('head_module', 'prior_generator', 'bbox_coder', 'featmap_strides')
    if not all(hasattr(head, part) for part in parts):
        raise UserError("response needs heads of MMYOLO's, but the head of the "
                        f'{owner} is a {type(head).__name__}')


def read_responses(head: nn.Module, outputs: Sequence[Sequence[Tensor]]) -> Responses:
    """Read what the layers of a head returned, and decode the boxes with its own coder.

    On each level with A anchors, the heads return class scores (N, A * num_classes, H, W) and
    box predictions (N, A * 4, H, W); those with objectnesses return these (N, A, H, W) in the
    third place. What other heads return there (in training, the distributions that the boxes
    are computed from), all further outputs and the auxiliary predictions of YOLOv7-P6 are
    ignored.

    Args:
        head (nn.Module): A dense head of MMYOLO's.
        outputs (Sequence[Sequence[Tensor]]): What its ``head_module`` returned.

    Returns:
        Responses: The predictions.
    """
    scores, boxes = (_main(levels) for levels in outputs[:2])
    sizes = [score.shape[-2:] for score in scores]
    objectnesses = None
    if len(outputs) > 2:
        third, num_anchors = _main(outputs[2]), head.num_base_priors
        if all(isinstance(level, Tensor) and level.shape[1:] == (num_anchors, *size)
               for level, size in zip(third, sizes)):
            objectnesses = _flatten(third, 1).squeeze(-1)
    priors = head.prior_generator.grid_priors(
        sizes, dtype=torch.float32, device=scores[0].device)
    strides = torch.cat([prior.new_full((len(prior), ), stride)
                         for prior, stride in zip(priors, head.featmap_strides)])
    decoded = head.bbox_coder.decode(torch.cat(priors)[None], _flatten(boxes, 4), strides)
    return Responses(_flatten(scores, head.num_classes), decoded, objectnesses, strides)


def _main(levels: Sequence) -> List[Tensor]:
    """The main predictions of levels that may also have auxiliary ones."""
    return [level[0] if isinstance(level, (list, tuple)) else level for level in levels]


def _flatten(levels: Sequence[Tensor], width: int) -> Tensor:
    """Levels of (N, A * width, H, W) to (N, all H * W * A, width)."""
    return torch.cat([level.float().permute(0, 2, 3, 1).reshape(len(level), -1, width)
                      for level in levels], dim=1)


@MODELS.register_module()
class ResponseLoss(nn.Module):
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
            student (Responses): The student's predictions.
            teacher (Responses): The teacher's predictions, equally many.

        Returns:
            dict[str, Tensor]: ``loss_response_cls``, ``loss_response_box`` and, if the
            heads have objectnesses, ``loss_response_obj``.

        Raises:
            UserError: The predictions of the two heads do not correspond.
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
    """Kullback-Leibler divergence of Bernoulli distributions, from raw scores.

    With p = sigmoid(teacher / T) and q = sigmoid(student / T) it is T² · (p log(p / q) +
    (1 - p) log((1 - p) / (1 - q))), where the factor T² keeps its gradients from shrinking
    with the temperature (`arXiv 1503.02531 <https://arxiv.org/abs/1503.02531>`_, section 2).

    Args:
        student (Tensor): Raw scores (before the sigmoid) of any shape.
        teacher (Tensor): Raw scores of the same shape.
        temperature (float): T. Defaults to 1.0.

    Returns:
        Tensor: The divergence for each score, of the same shape.
    """
    student, teacher = student / temperature, teacher / temperature
    positive = F.logsigmoid(teacher) - F.logsigmoid(student)
    negative = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return temperature**2 * (teacher.sigmoid() * positive + (-teacher).sigmoid() * negative)


def _mean_of(values: Tensor) -> Tensor:
    """The mean, or 0 if there are no values."""
    return values.sum() / max(len(values), 1)


def _well_formed(boxes: Tensor) -> Tensor:
    """Make boxes (M, 4) that end before they begin empty.

    Heads that predict unbounded distances can emit such boxes, and overlaps of negative areas
    are meaningless.
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

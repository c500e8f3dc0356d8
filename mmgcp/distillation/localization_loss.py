# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss between two distributions of where the edges of boxes are."""
from typing import Dict, Optional

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.registry import MODELS
from mmgcp.utils.checks import MAPPING, SHARE, checked

from .head_loss import TEMPERATURE, HeadLoss, mean_of
from .responses import Responses, check_same, count_distances


@MODELS.register_module()
class LocalizationLoss(HeadLoss):
    r"""`Localization distillation (LD) <https://arxiv.org/abs/2102.12252>`_.

    For heads that predict the distance of each edge of a box as a distribution over the distances
    0, 1, ..., B - 1, such as those of YOLOv8, YOLOv5u, PPYOLOE, the larger YOLOv6 v3 and GFL. How
    sharp a distribution is tells how sure the teacher is of the edge. From the raw scores z of the
    distances, the loss of a prediction is

    .. math::
        \frac{T^2}{4} \sum_e KL(softmax(z^{teacher}_e / T) \,\|\, softmax(z^{student}_e / T))

    It is averaged over the predictions of two regions:

    - ``main``: the positives, which are the predictions that the teacher is confident of;
    - ``valuable``: the predictions around them that may still teach where objects are (the paper's
      valuable localization region): those whose confidence is lower, but not below
      ``valuable_ratio`` times the threshold.

    This deviates from the paper, which finds the regions by the overlap of anchors with ground
    truths, in the same proportion: anchors differ from detector to detector, confidences do
    not. The authors' code weights each prediction by the student's best score, averages over the B
    distances instead of summing, and sums over the predictions. So its weight of 0.25 means
    another thing.

    Args:
        temperature (float): The T. Defaults to 10.0.
        weights (dict, optional): Multipliers of ``main`` and ``valuable``, 1 for those that are
            left out; a part with the weight 0 is not computed. Defaults to None.
        score_thr (float): A prediction is a positive if the teacher's best class score is above
            it. Defaults to 0.1.
        valuable_ratio (float): Where the valuable region ends, as a share of ``score_thr``.
            Defaults to 0.25.

    Raises:
        UserError: A setting is wrong.
    """
    kind = 'localization'
    parts = dict(main=1., valuable=1.)

    @checked(temperature=TEMPERATURE, weights=MAPPING, score_thr=SHARE, valuable_ratio=SHARE)
    def __init__(self,
                 temperature: float = 10.0,
                 weights: Optional[Dict[str, float]] = None,
                 score_thr: float = 0.1,
                 valuable_ratio: float = 0.25):
        super().__init__(weights)
        self.temperature = temperature
        self.score_thr = score_thr
        self.valuable_ratio = valuable_ratio

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """Check that both heads predict distributions over equally many distances."""
        super().connect(student, teacher)
        counts = []
        for model, owner in ((student, 'student'), (teacher, 'teacher')):
            counts.append(count_distances(model.bbox_head))
            if not counts[-1]:
                raise UserError(f'mmgcp.LocalizationLoss needs a head that predicts distributions '
                                f'of the edges of boxes, but the {type(model.bbox_head).__name__} '
                                f'of the {owner} does not')
        if counts[0] != counts[1]:
            raise UserError('the distributions of the edges of boxes must be over equally many '
                            f'distances, but are over {counts[0]} in the student and {counts[1]} '
                            'in the teacher')

    def forward(self, student: Responses, teacher: Responses) -> Dict[str, Tensor]:
        """Compare the predictions of student and teacher for the same images.

        Returns ``loss_localization_main`` and ``loss_localization_valuable``. Raises a UserError
        if the predictions do not correspond.
        """
        check_same(student, teacher)
        confidences = teacher.confidences
        main = confidences > self.score_thr
        valuable = ~main & (confidences > self.valuable_ratio * self.score_thr)

        def divergence(region: Tensor) -> Tensor:
            return mean_of(edge_divergence(
                student.edges[region], teacher.edges[region], self.temperature))

        return self._weighted(dict(main=lambda: divergence(main),
                                   valuable=lambda: divergence(valuable)))


def edge_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.) -> Tensor:
    """Kullback-Leibler divergence of the distributions of edges, from raw scores.

    It is summed over the B distances, averaged over the four edges of a box, and multiplied by
    the square of the temperature. Raw scores (..., 4, B) become (..., ).
    """
    student, teacher = (F.log_softmax(scores / temperature, dim=-1)
                        for scores in (student, teacher))
    divergence = F.kl_div(student, teacher, reduction='none', log_target=True)
    return temperature**2 * divergence.sum(-1).mean(-1)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss between the teacher's predictions and those of its head for the student's features."""
from typing import Dict, Optional, Sequence, Tuple, Union

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.registry import MODELS
from mmgcp.utils.checks import MAPPING, checked, number_in

from .cross_layers import count_input_channels, find_cross_layers, read_layers
from .feature_losses import channel_statistics, standardize
from .head_loss import TEMPERATURE, HeadLoss
from .localization_loss import edge_divergence
from .response_loss import box_difference
from .responses import HeadRun, Responses


@MODELS.register_module()
class CrossHeadLoss(HeadLoss):
    r"""`Cross-head knowledge distillation (CrossKD) <https://arxiv.org/abs/2306.11369>`_.

    Features of the student's head are fed into the teacher's head, and what this predicts from
    them is compared with what it predicts from its own. So the student learns what the teacher's
    predictions need, while its own predictions only follow the ground truth and not also a
    teacher who may contradict it.

    The features cross at some layers of the heads: the teacher's layer reads what the student's
    reads. By default these are the convolutions that emit the predictions, so that features cross
    after the last of the branches' other layers, or right after the neck in heads without any
    (YOLOv5). The authors let them cross one convolution earlier. All paths from the neck to the
    predictions have to lead through one of the layers.

    If the numbers of channels differ, as they do in pruned detectors, a 1x1 convolution without
    bias adapts the student's. As in the authors' code, each channel is then given the mean and
    the standard deviation that it has in the teacher, over the images and positions of the batch.

    With the teacher's confidences w (best class score times objectness) of all predictions and
    their sum W, at least 1, the parts are

    - ``cls``: the quality focal loss (:func:`quality_focal_loss`) of all class scores, summed,
      by W; if the head has objectnesses, that of each prediction is weighted with w;
    - ``obj``: the quality focal loss of all objectnesses, summed, by W;
    - ``edge``: the divergence of the distributions of the edges
      (:func:`mmgcp.distillation.localization_loss.edge_divergence`), averaged with the weights w;
    - ``box``: one minus the GIoU of the boxes, averaged with the weights w, for heads that do not
      predict distributions.

    The authors divide ``cls`` by the number of anchors that ground truths are assigned to instead.

    Args:
        layers (Sequence[str | tuple[str, str]], optional): The layers, by their names as in
            ``named_modules()``; a pair of names stands for a layer whose name differs between
            student and teacher. Defaults to None: the convolutions that emit the predictions.
        weights (dict, optional): Multipliers of the parts; 3 for ``edge`` and 1 for others if
            they are left out, as in the authors' configs. Defaults to None.
        beta (float): Exponent of the quality focal loss, at least 1. Defaults to 1.0.
        temperature (float): That of ``edge``. Defaults to 1.0.

    Raises:
        UserError: A setting is wrong.
    """
    kind = 'cross'
    parts = dict(cls=1., obj=1., box=1., edge=3.)

    @checked(weights=MAPPING, beta=number_in(1, 100), temperature=TEMPERATURE)
    def __init__(self,
                 layers: Optional[Sequence[Union[str, Tuple[str, str]]]] = None,
                 weights: Optional[Dict[str, float]] = None,
                 beta: float = 1.0,
                 temperature: float = 1.0):
        super().__init__(weights)
        self.layers = [] if layers is None else read_layers(layers)
        self.beta = beta
        self.temperature = temperature
        self._fitting: Sequence[nn.Module] = []  # what adapts the channels of each layer's input

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the layers, and make adapters where the numbers of their channels differ."""
        super().connect(student, teacher)
        self.layers = self.layers or find_cross_layers(student, teacher)
        self._fitting = [nn.Identity() if mine == theirs else nn.Conv2d(mine, theirs, 1, bias=False)
                         for mine, theirs in count_input_channels(self.layers, student, teacher)]
        self.adapters = [module for module in self._fitting if isinstance(module, nn.Conv2d)]

    def compare(self, student: HeadRun, teacher: HeadRun) -> Dict[str, Tensor]:
        """Let the teacher's head predict from the student's features, and compare."""
        crossed = {}
        for fit, (name, other) in zip(self._fitting, self.layers):
            pairs = zip(student.layer_inputs[name], teacher.layer_inputs[other])
            crossed[other] = [_as_in(fit(mine), theirs) for mine, theirs in pairs]
        return self(teacher.repeat(crossed), teacher.responses)

    def forward(self, crossed: Responses, teacher: Responses) -> Dict[str, Tensor]:
        """Compare the predictions of the teacher's head from the student's features and its own.

        Returns ``loss_cross_<part>`` for the parts that the head has.
        """
        confidences = teacher.confidences
        total = confidences.sum().clamp(min=1)
        focal = quality_focal_loss(crossed.scores, teacher.scores, self.beta).sum(-1)
        losses = {}
        if teacher.objectnesses is None:
            losses['cls'] = focal.sum()
        else:
            losses['cls'] = (confidences * focal).sum()
            losses['obj'] = quality_focal_loss(
                crossed.objectnesses, teacher.objectnesses, self.beta).sum()
        if teacher.edges is None:
            difference = box_difference(crossed.boxes.flatten(0, 1), teacher.boxes.flatten(0, 1))
            losses['box'] = (confidences.flatten() * difference).sum()
        else:
            divergence = edge_divergence(crossed.edges, teacher.edges, self.temperature)
            losses['edge'] = (confidences * divergence).sum()
        # A part without weight is not left out: distributed training waits for all gradients
        return {f'loss_{self.kind}_{part}': self.weights[part] * value / total
                for part, value in losses.items()}


def quality_focal_loss(student: Tensor, teacher: Tensor, beta: float = 1.) -> Tensor:
    """`Quality focal loss <https://arxiv.org/abs/2006.04388>`_ with the teacher's scores as target.

    With p = sigmoid(student) and q = sigmoid(teacher) it is abs(q - p)^beta times the binary
    cross-entropy of p and q. Raw scores may have any shape; the loss of each is returned.
    """
    target = teacher.sigmoid()
    distance = (target - student.sigmoid()).abs()
    return distance**beta * F.binary_cross_entropy_with_logits(student, target, reduction='none')


def _as_in(feature: Tensor, model: Tensor) -> Tensor:
    """Give the channels of a feature (N, C, H, W) the statistics and the precision of another's."""
    mean, deviation = channel_statistics(model)
    return (standardize(feature) * deviation + mean).to(model.dtype)

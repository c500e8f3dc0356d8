# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The boxes that a detector predicts and the best of them, as operations that can be exported."""
from typing import Any, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmcv.ops import nms
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.utils.checks import COUNT, SHARE, check_value, number_in

NMS_SETTINGS = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}  # that are known here
# What numbers of test_cfg may be, where they are given
NUMBERS = dict(score_thr=number_in(-1, 1), nms_pre=COUNT, max_per_img=COUNT,
               min_bbox_size=number_in(-1))
DEFAULT_NMS_PRE = 100000  # as in MMYOLO's predict_by_feat


def decode(head: nn.Module, outputs: Sequence[List[Tensor]],
           fixed_size: bool) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Decode what a head of MMYOLO emits, as its ``predict_by_feat`` does.

    Args:
        head (nn.Module): A child of :class:`mmyolo.models.YOLOv5Head`.
        outputs (Sequence[list[Tensor]]): For each level the class scores (N, A * C, H, W), the
            box predictions (N, A * 4, H, W) and, of some heads, the objectnesses (N, A, H, W).
        fixed_size (bool): Whether the anchors of all positions may become constants.

    Returns:
        tuple[Tensor, Tensor, Tensor | None]: Boxes (N, P, 4) as (x1, y1, x2, y2) in pixels,
        scores (N, P, C) and objectnesses (N, P) of all P anchors.
    """
    sizes = [scores.shape[-2:] for scores in outputs[0]]
    if fixed_size:
        sizes = [tuple(int(side) for side in size) for size in sizes]
    first = outputs[0][0]
    priors = head.prior_generator.grid_priors(sizes, dtype=first.dtype, device=first.device)
    strides = torch.cat([torch.full_like(prior[:, 0], stride)
                         for prior, stride in zip(priors, head.featmap_strides)])
    boxes = head.bbox_coder.decode(torch.cat(priors)[None], _flat(outputs[1], 4), strides)
    scores = _flat(outputs[0], head.num_classes).sigmoid()
    objectness = _flat(outputs[2], 1)[..., 0].sigmoid() if len(outputs) > 2 else None
    return boxes, scores, objectness


def _flat(levels: List[Tensor], width: int) -> Tensor:
    """From (N, A * width, H, W) of each level to (N, P, width)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, width)
                      for level in levels], 1)


def check_nms(test_cfg: Any) -> None:
    """Raise a UserError if :class:`BestBoxes` cannot do what a ``test_cfg`` asks for."""
    settings = (test_cfg or {}).get('nms')
    if not isinstance(settings, dict) or settings.get('type', 'nms') != 'nms' or (
            set(settings) - NMS_SETTINGS) or 'iou_threshold' not in settings:
        raise UserError("only test_cfg.nms=dict(type='nms', iou_threshold=...) can be in the file, "
                        f'but it is {settings!r}: export the raw outputs')
    check_value('test_cfg.nms.iou_threshold', settings['iou_threshold'], SHARE)
    for name, check in NUMBERS.items():
        if name in test_cfg:
            check_value(f'test_cfg.{name}', test_cfg[name], check)


class BestBoxes(nn.Module):
    """Chooses boxes by scores and NMS, as MMYOLO's heads do by their ``test_cfg``.

    The result has a fixed number K of boxes for each image, ``max_per_img`` or as many as there
    can be: the best come first, and there are zeros behind them, with the label -1. Unlike
    MMYOLO, it does so with ``yolox_style``, too, which there knows no ``max_per_img``.

    Args:
        test_cfg (dict): ``score_thr``, ``nms_pre``, ``nms``, ``max_per_img``, ``multi_label``,
            ``min_bbox_size`` and ``yolox_style`` as in MMYOLO's configs.
        num_classes (int): Number of classes C.
        fixed_size (bool): Whether the number of anchors is that of the traced images.
    """

    def __init__(self, test_cfg: dict, num_classes: int, fixed_size: bool):
        super().__init__()
        check_nms(test_cfg)
        self.score_thr = float(test_cfg.get('score_thr', -1))
        self.nms_pre = int(test_cfg.get('nms_pre', DEFAULT_NMS_PRE))
        self.most = int(test_cfg.get('max_per_img', 300))
        self.least_side = float(test_cfg.get('min_bbox_size', -1))
        self.iou_threshold = float(test_cfg['nms']['iou_threshold'])
        self.class_agnostic = bool(test_cfg['nms'].get('class_agnostic', False))
        self.multi_label = bool(test_cfg.get('multi_label', True)) and num_classes > 1
        self.filters_objectness = self.score_thr > 0 and not test_cfg.get('yolox_style', False)
        self.fixed_size = fixed_size

    def forward(self, boxes: Tensor, scores: Tensor,
                objectness: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """Choose boxes.

        Args:
            boxes (Tensor): (N, P, 4) as (x1, y1, x2, y2).
            scores (Tensor): (N, P, C).
            objectness (Tensor, optional): (N, P).

        Returns:
            tuple[Tensor, Tensor, Tensor]: Boxes (N, K, 4), scores (N, K), labels (N, K).
        """
        boxes, scores, labels = self._candidates(boxes, scores, objectness)
        valid = scores > self.score_thr
        if self.least_side >= 0:
            valid = valid & (boxes[..., 2:] - boxes[..., :2] > self.least_side).all(-1)
        scores = torch.where(valid, scores, torch.full_like(scores, -1))
        kept = self._suppress(boxes, scores, labels, valid)
        scores = torch.where(kept > 0, scores, torch.full_like(scores, -1))
        scores, best = scores.topk(min(self.most, int(scores.shape[1])))
        none = scores < 0
        boxes = torch.gather(boxes, 1, best[..., None].expand(-1, -1, 4))
        labels = torch.gather(labels, 1, best)
        return (torch.where(none[..., None], torch.zeros_like(boxes), boxes),
                torch.where(none, torch.zeros_like(scores), scores),
                torch.where(none, torch.full_like(labels, -1), labels))

    def _candidates(self, boxes, scores, objectness):
        """The best pairs of an anchor and a class: boxes (N, M, 4), scores (N, M), labels."""
        num_classes = scores.shape[2]
        if objectness is not None:
            scores = scores * objectness[..., None]
            if self.filters_objectness:
                passed = (objectness > self.score_thr)[..., None]
                scores = torch.where(passed, scores, torch.full_like(scores, -1))
        if self.multi_label:
            pairs = scores.flatten(1)
        else:
            pairs, best_labels = scores.max(-1)
        number = self.nms_pre
        if self.fixed_size:
            number = min(number, int(pairs.shape[1]))
        else:  # there may be fewer pairs than that
            pairs = torch.cat([pairs, torch.full_like(pairs[:, :1], -1).expand(-1, number)], 1)
        scores, chosen = pairs.topk(number)
        chosen = torch.where(scores < 0, torch.zeros_like(chosen), chosen)
        if self.multi_label:
            labels = chosen % num_classes
            chosen = torch.div(chosen, num_classes, rounding_mode='floor')
        else:
            labels = torch.gather(best_labels, 1, chosen)
        return torch.gather(boxes, 1, chosen[..., None].expand(-1, -1, 4)), scores, labels

    def _suppress(self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Ones (N, M) at the boxes that NMS keeps, of each class apart: they are moved apart."""
        if not self.class_agnostic:
            known = torch.where(valid[..., None], boxes, torch.zeros_like(boxes))
            step = known.amax((1, 2))[:, None] + 1
            boxes = boxes + (labels.to(boxes) * step)[..., None]
        # a box whose right side is left of its left one overlaps nothing; ONNX would turn it round
        boxes = torch.cat((boxes[..., :2], torch.max(boxes[..., :2], boxes[..., 2:])), -1)
        rows = NonMaxSuppression.apply(boxes, scores[:, None], self.most, self.iou_threshold,
                                       max(self.score_thr, 0.))
        return torch.zeros_like(scores).index_put(
            (rows[:, 0], rows[:, 2]), torch.ones_like(rows[:, 0]).to(scores))


class NonMaxSuppression(torch.autograd.Function):
    """ONNX's operation of this name, for boxes (N, M, 4) and scores (N, 1, M)."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, most: int, iou_threshold: float,
                score_thr: float) -> Tensor:
        """Return rows (S, 3) of image, 0 and box."""
        rows = [torch.zeros(0, 3, dtype=torch.long, device=boxes.device)]
        for number, (image_boxes, (image_scores, )) in enumerate(zip(boxes, scores)):
            found = (image_scores > score_thr).nonzero()[:, 0]
            if len(found):
                kept = found[nms(image_boxes[found], image_scores[found], iou_threshold)[1]][:most]
                rows.append(torch.stack((torch.full_like(kept, number), kept * 0, kept), 1))
        return torch.cat(rows)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, most: int, iou_threshold: float,
                 score_thr: float) -> Any:
        """Return the operation in a graph of torch's exporter."""
        settings = [torch.tensor([most], dtype=torch.long), torch.tensor([iou_threshold]),
                    torch.tensor([score_thr])]
        return g.op('NonMaxSuppression', boxes, scores,
                    *(g.op('Constant', value_t=value) for value in settings))

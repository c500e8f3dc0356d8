# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Whether the boxes of an exported file are a result of NMS on a detector's own candidates."""
import math
from typing import Any, Iterator, Tuple

import torch
import torch.nn as nn
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from .candidates import DEFAULT_NMS_PRE
from .check import predict
from .exported import ExportedModel
from .predictions import DETECTIONS

NEARLY = 1e-3  # relative difference of numbers that rounding may put in the other order
ROUNDING = 1e-6  # of scores: onnxruntime's sigmoid has an absolute error
LEAST = 1e-30  # instead of scores of 0, which have no logarithm
SLACK = 0.01  # of overlaps: NMS moves classes apart, and so rounds as large numbers do


@torch.no_grad()
def detections_difference(exported: ExportedModel, detector: nn.Module, images: Tensor,
                          test_cfg: Any) -> float:
    """Compare boxes with what the detector itself predicts, before NMS and after it.

    Rounding decides which boxes NMS keeps where scores nearly tie, as those of a detector do that
    has hardly been trained. But each one in the file is a candidate of the detector, no two of a
    class overlap, and each one that is only kept by the detector overlaps a better one in the file.

    Args:
        exported (ExportedModel): The file.
        detector (nn.Module): The detector, not fused.
        images (Tensor): (N, C, H, W).
        test_cfg (dict): By which it predicts.

    Returns:
        float: The largest of: how far a box is from the nearest candidate of its class; how far
        the overlap of two boxes is above the threshold; by how much the box for which another one
        is left out is worse than it, or overlaps it too little. Coordinates are relative to the
        largest one of a box, since a corner near 0 is the difference of a centre and half a side,
        which round as large numbers do. Scores are compared by their logarithms, relative to
        those below -1, since logits round so. Infinite where a value is not finite, or shapes or
        the number of boxes are wrong.
    """
    outputs = exported.run(images)
    boxes, scores, labels = (outputs[name] for name in DETECTIONS)
    if scores.shape != labels.shape or boxes.shape != (len(images), *scores.shape[1:], 4):
        return math.inf
    differences = [0.]
    kept = predict(detector, images, test_cfg)
    for index, (candidates, limit) in enumerate(_candidates(detector, images, test_cfg)):
        real = labels[index] >= 0
        found = InstanceData(bboxes=boxes[index][real], scores=scores[index][real],
                             labels=labels[index][real])
        if len(found) > test_cfg.max_per_img or (len(found) and not len(candidates)):
            return math.inf
        if len(found) == test_cfg.max_per_img:  # there was no room for more
            limit = max(limit, float(found.scores.min()))
        apart, nearest = _nearest(found, candidates)
        found.whole, found.known = candidates.whole[nearest], candidates.known[nearest]
        _, same = _nearest(kept[index], candidates)
        missing = InstanceData(**dict(kept[index].items()), whole=candidates.whole[same],
                               known=candidates.known[same])
        differences += [float(values.nan_to_num(math.inf).max()) for values in (
            apart, _overlaps(found, test_cfg.nms), _left_out(missing, found, limit, test_cfg.nms)
        ) if len(values)]
    return max(differences)


def _candidates(detector: nn.Module, images: Tensor,
                test_cfg: Any) -> Iterator[Tuple[InstanceData, float]]:
    """What NMS chooses from in each image, and the score at most of what may not be among it.

    ``whole`` is the box before it is cut off at the sides of the image, ``known`` whether what is
    left of it tells which one it is: it does not reach out at both ends.
    """
    number = int(test_cfg.get('nms_pre', DEFAULT_NMS_PRE))
    threshold = float(test_cfg.get('score_thr', -1))
    least = float(test_cfg.get('min_bbox_size', -1))
    size = images.new_tensor(images.shape[:1:-1])  # width, height
    shift = 4 * int(size.max())
    every = ConfigDict(dict(test_cfg, nms_pre=10**9, min_bbox_size=-1,
                            score_thr=threshold * (1 - NEARLY)))
    for item, shifted in zip(predict(detector, images, every, with_nms=False),
                             predict(detector, images, every, with_nms=False, shift=shift)):
        item.whole = shifted.bboxes - shift
        item.known = ((item.bboxes[:, :2] > 0) | (item.bboxes[:, 2:] < size)).all(-1)
        item = item[item.scores.argsort(descending=True)]
        limit = threshold
        if len(item) > number:
            limit = max(limit, float(item.scores[number]))
            item = item[item.scores >= item.scores[number - 1] * (1 - NEARLY)]
        if least >= 0:
            sides = item.whole[:, 2:] - item.whole[:, :2]
            item = item[(sides > least * (1 - NEARLY)).all(-1)]
        yield item, limit


def _better(scores: Tensor, others: Tensor) -> Tensor:
    """By how much scores are better than others, by their logarithms."""
    logs, other_logs = scores.clamp(min=LEAST).log(), others.clamp(min=LEAST).log()
    better = (logs - other_logs) / logs.abs().clamp(min=1)
    return better.masked_fill((scores - others).abs() < ROUNDING, 0)


def _apart(boxes: InstanceData, others: InstanceData) -> Tensor:
    """How far each box (B, ) is from each other one (O, ): (B, O), infinite for other classes."""
    places = boxes.bboxes[:, None]
    apart = (places - others.bboxes).abs().amax(-1) / places.abs().amax(-1).clamp(min=1)
    apart = torch.max(apart, _better(boxes.scores[:, None], others.scores).abs())
    return apart.masked_fill(boxes.labels[:, None] != others.labels, math.inf)


def _nearest(boxes: InstanceData, others: InstanceData) -> Tuple[Tensor, Tensor]:
    """How far each box is from the nearest other one (B, ), and which one that is (B, )."""
    rows = [_apart(boxes[[index]], others).min(1) for index in range(len(boxes))]  # others: many
    return (torch.cat([boxes.scores[:0], *(row.values for row in rows)]),
            torch.cat([boxes.labels[:0].long(), *(row.indices for row in rows)]))


def _rivals(boxes: InstanceData, others: InstanceData, nms: Any, unknown: float) -> Tensor:
    """How much pairs (B, O) overlap; -1 where NMS does not compare them."""
    overlaps = bbox_overlaps(boxes.whole, others.whole)
    overlaps[~(boxes.known[:, None] & others.known)] = unknown
    if nms.get('class_agnostic'):
        return overlaps
    return overlaps.masked_fill(boxes.labels[:, None] != others.labels, -1)


def _overlaps(boxes: InstanceData, nms: Any) -> Tensor:
    """How far overlaps of boxes with others are above the threshold (B * B, )."""
    overlaps = _rivals(boxes, boxes, nms, unknown=0).fill_diagonal_(0)
    return (overlaps - nms.iou_threshold - SLACK).clamp(min=0).flatten()


def _left_out(boxes: InstanceData, found: InstanceData, limit: float, nms: Any) -> Tensor:
    """How wrong it is that each box was not found, 0 if it was (B, )."""
    reasons = [_better(boxes.scores, torch.tensor(limit))]
    if len(found):
        lacking = nms.iou_threshold - SLACK - _rivals(boxes, found, nms, unknown=1)
        worse = _better(boxes.scores[:, None], found.scores)
        reasons += [_apart(boxes, found).amin(1), torch.max(lacking, worse).amin(1)]
    return torch.stack(reasons).amin(0).clamp(min=0)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How far what an exported file computes is from what the detector computes in PyTorch."""
import math
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_overlaps
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmgcp.nn.forward import flatten_tensors
from mmgcp.nn.temporarily import eval_mode

from .candidates import DEFAULT_NMS_PRE, decode
from .exported import ExportedModel
from .predictions import DETECTIONS

NEARLY = 1e-3  # relative difference of scores which rounding does not exceed
LEAST = 1e-30  # instead of scores of 0, which have no logarithm
SLACK = 0.01  # of overlaps: NMS moves classes apart, and so rounds as large numbers do


def sample_images(detector: nn.Module, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Make images (N, C, H, W) of coarse and fine noise, normalised as the detector reads them."""
    generator = torch.Generator().manual_seed(seed)
    number, channels, height, width = shape
    coarse = torch.rand(number, channels, 6, 6, generator=generator)
    coarse = F.interpolate(coarse, (height, width), mode='bilinear', align_corners=False)
    pixels = 255 * (0.8 * coarse + 0.2 * torch.rand(*shape, generator=generator))
    preprocessor = detector.data_preprocessor
    if getattr(preprocessor, '_enable_normalize', False):
        pixels = (pixels - preprocessor.mean.cpu()) / preprocessor.std.cpu()
    return pixels


@torch.no_grad()
def raw_difference(exported: ExportedModel, detector: nn.Module, images: Tensor) -> float:
    """Compare raw outputs.

    Args:
        exported (ExportedModel): The file.
        detector (nn.Module): The detector, not fused.
        images (Tensor): (N, C, H, W).

    Returns:
        float: The largest difference; in maps with values above 1, relative to the largest one,
        because sums round by the size of their terms. Infinite where the shapes differ or a value
        is not finite.
    """
    with eval_mode(detector):
        expected = flatten_tensors(detector(images, mode='tensor'))
    return max(_difference(*pair) for pair in zip(exported.run(images).values(), expected))


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    places = tuple(range(expected.dim()))[-2:]
    largest = expected.abs().amax(places, keepdim=True).clamp(min=1)
    difference = float(((found - expected).abs() / largest).max())
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def predict(detector: nn.Module, images: Tensor, test_cfg: Any,
            with_nms: bool = True) -> List[InstanceData]:
    """What a detector itself predicts for images (N, C, H, W), in their pixels."""
    height, width = images.shape[-2:]
    meta = dict(ori_shape=(height, width), img_shape=(height, width), scale_factor=(1., 1.))
    with eval_mode(detector):
        outputs = detector(images, mode='tensor')
        return detector.bbox_head.predict_by_feat(
            *outputs, batch_img_metas=[meta] * len(images), cfg=test_cfg, rescale=True,
            with_nms=with_nms)


def telling_threshold(detector: nn.Module, images: Tensor, test_cfg: Any) -> Optional[float]:
    """A score that some boxes are above, for a check; None if ``test_cfg`` has such a one."""
    threshold = float(test_cfg.get('score_thr', -1))
    found = predict(detector, images, test_cfg)
    if all(len(item.scores) for item in found):
        return None
    with eval_mode(detector), torch.no_grad():
        _, scores, objectness = decode(detector.bbox_head, detector(images, mode='tensor'), True)
    if objectness is not None:  # which has to pass the threshold by itself, too
        scores = torch.min(scores, objectness[..., None]) * objectness[..., None]
    scores = scores.flatten(1)
    lowest = float(scores.topk(min(20, scores.shape[1]))[0][:, -1].min())
    return min(threshold, lowest / 2)


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
        those below -1, since logits round so. Infinite where a value is not finite.
    """
    outputs: Dict[str, Tensor] = exported.run(images)
    before_nms = int(test_cfg.get('nms_pre', DEFAULT_NMS_PRE))
    threshold = float(test_cfg.get('score_thr', -1))
    more = ConfigDict(dict(test_cfg, nms_pre=2 * before_nms, score_thr=threshold * (1 - NEARLY)))
    differences = [0.]
    for index, (candidates, kept) in enumerate(zip(
            predict(detector, images, more, with_nms=False), predict(detector, images, test_cfg))):
        candidates = candidates[candidates.scores.argsort(descending=True)]
        boxes, scores, labels = (outputs[name][index] for name in DETECTIONS)
        real = labels >= 0
        found = InstanceData(bboxes=boxes[real], scores=scores[real], labels=labels[real])
        # what is not better than this may be missing
        limits = [torch.tensor([threshold]), candidates.scores[before_nms:before_nms + 1]]
        if bool(real.all()):  # there was no room for more
            limits.append(found.scores.sort()[0][:1])
        differences += [float(values.nan_to_num(math.inf).max()) for values in (
            _from_nearest(found, candidates),
            _overlaps(found[_whole(found, images)], test_cfg.nms),
            _left_out(kept, _whole(kept, images), found, torch.cat(limits).max(), test_cfg.nms)
        ) if len(values)]
    return max(differences)


def _whole(boxes: InstanceData, images: Tensor) -> Tensor:
    """Which boxes (B, ) are not cut off at a side of the image: NMS sees boxes before that."""
    height, width = images.shape[-2:]
    places = boxes.bboxes
    return (places[:, :2] > 0).all(-1) & (places[:, 2] < width) & (places[:, 3] < height)


def _better(scores: Tensor, others: Tensor) -> Tensor:
    """By how much scores are better than others, by their logarithms."""
    logs, other_logs = scores.clamp(min=LEAST).log(), others.clamp(min=LEAST).log()
    return (logs - other_logs) / logs.abs().clamp(min=1)


def _apart(boxes: InstanceData, others: InstanceData) -> Tensor:
    """How far each box (B, ) is from each other one (O, ): (B, O), infinite for other classes."""
    places = boxes.bboxes[:, None]
    apart = (places - others.bboxes).abs().amax(-1) / places.abs().amax(-1).clamp(min=1)
    apart = torch.max(apart, _better(boxes.scores[:, None], others.scores).abs())
    return apart.masked_fill(boxes.labels[:, None] != others.labels, math.inf)


def _from_nearest(boxes: InstanceData, others: InstanceData) -> Tensor:
    """How far each box is from the nearest other one (B, )."""
    if len(others) == 0:
        return torch.full_like(boxes.scores, math.inf)
    return torch.cat([boxes.scores[:0], *(  # one by one: there are many others
        _apart(boxes[[index]], others).amin(1) for index in range(len(boxes)))])


def _rivals(boxes: InstanceData, others: InstanceData, nms: dict) -> Tensor:
    """How much each pair (B, O) overlaps, -1 where NMS does not compare them."""
    overlaps = bbox_overlaps(boxes.bboxes, others.bboxes)
    if nms.get('class_agnostic'):
        return overlaps
    return overlaps.masked_fill(boxes.labels[:, None] != others.labels, -1)


def _overlaps(boxes: InstanceData, nms: dict) -> Tensor:
    """How far overlaps of each box with others are above the threshold (B, )."""
    overlaps = _rivals(boxes, boxes, nms).fill_diagonal_(-1)
    return (overlaps - nms.iou_threshold - SLACK).clamp(min=0).flatten()


def _left_out(boxes: InstanceData, whole: Tensor, found: InstanceData, limit: Tensor,
              nms: dict) -> Tensor:
    """How wrong it is that each box was not found, 0 if it was (B, )."""
    reasons = [_better(boxes.scores, limit)]
    if len(found):
        overlaps = _rivals(boxes, found, nms)
        overlaps[(overlaps >= 0) & ~whole[:, None]] = 1  # it is not known how much
        lacking = nms.iou_threshold - SLACK - overlaps
        worse = _better(boxes.scores[:, None], found.scores)
        reasons += [_apart(boxes, found).amin(1), torch.max(lacking, worse).amin(1)]
    return torch.stack(reasons).amin(0).clamp(min=0)

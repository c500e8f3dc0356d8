# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How far what an exported file computes is from what the detector computes in PyTorch."""
import math
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor

from mmgcp.nn.forward import flatten_tensors
from mmgcp.nn.temporarily import eval_mode

from .candidates import decode
from .exported import ExportedModel
from .predictions import DETECTIONS

FORGIVEN = 100  # of so many boxes one may differ: NMS decides otherwise where overlaps nearly tie
NEARLY = 1e-4  # a difference that can be rounding


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
def predict(detector: nn.Module, images: Tensor, test_cfg: Any) -> List[InstanceData]:
    """What a detector itself predicts for images (N, C, H, W), in their pixels."""
    height, width = images.shape[-2:]
    meta = dict(ori_shape=(height, width), img_shape=(height, width), scale_factor=(1., 1.))
    with eval_mode(detector):
        outputs = detector(images, mode='tensor')
        return detector.bbox_head.predict_by_feat(
            *outputs, batch_img_metas=[meta] * len(images), cfg=test_cfg, rescale=True)


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


def detections_difference(exported: ExportedModel, detector: nn.Module, images: Tensor,
                          test_cfg: Any) -> float:
    """Compare boxes with those that the detector itself predicts.

    Args:
        exported (ExportedModel): The file.
        detector (nn.Module): The detector, not fused.
        images (Tensor): (N, C, H, W).
        test_cfg (dict): By which it predicts.

    Returns:
        float: The largest difference of a box and its counterpart of the same class, of scores and
        of coordinates. These are relative to the largest coordinate of the box, as a corner at 0
        is the difference of a centre and half a side, which round as large numbers do. A box
        without counterpart has an infinite one. One in a hundred boxes is left out, and so are
        those that are hardly better than the first one that is left out of the file.
    """
    outputs: Dict[str, Tensor] = exported.run(images)
    most = outputs['scores'].shape[1]
    wider = ConfigDict(dict(test_cfg, max_per_img=most + 1))
    predicted, worst = predict(detector, images, wider), 0.
    for index, item in enumerate(predicted):
        real = outputs['labels'][index] >= 0
        found = [outputs[name][index][real] for name in DETECTIONS]
        expected = [item.bboxes[:most], item.scores[:most], item.labels[:most]]
        # a box that is hardly better than the first one that is not among them is uncertain
        cut = float(item.scores[most]) if len(item.scores) > most else wider.get('score_thr', -1)
        unlike = [_unlike(found, expected, cut), _unlike(expected, found, cut)]
        if len(item.scores) and not any(map(len, unlike)):  # all scores are the same
            unlike = [_unlike_scores(found[1], expected[1])]
        values = torch.cat(unlike).sort()[0]
        values = values[:len(values) - len(values) // FORGIVEN]
        difference = float(values[-1]) if len(values) else 0.
        if difference > NEARLY:
            difference = min(difference, _with_other_ties(
                found, expected, detector, images[index:index + 1], test_cfg))
        worst = max(worst, difference)
    return worst


def _with_other_ties(found: Sequence[Tensor], expected: Sequence[Tensor], detector: nn.Module,
                     images: Tensor, test_cfg: Any) -> float:
    """Compare boxes of an image of which NMS has perhaps chosen others, since scores nearly tie.

    So it is where a detector has hardly been trained. All of them must be among those that NMS
    has to choose from, and the scores of those that are chosen must be the same.
    """
    everything = ConfigDict(dict(test_cfg, max_per_img=10**6))
    everything.nms = dict(everything.nms, iou_threshold=1.)
    item, = predict(detector, images, everything)
    candidates = [item.bboxes, item.scores, item.labels]
    return float(torch.cat([_unlike(found, candidates, -1.),
                            _unlike_scores(found[1], expected[1])]).max())


def _unlike_scores(scores: Tensor, others: Tensor) -> Tensor:
    if len(scores) != len(others):
        return torch.full((1, ), math.inf)
    return (scores.sort()[0] - others.sort()[0]).abs().amax().view(1)


def _unlike(boxes: Sequence[Tensor], others: Sequence[Tensor], cut: float) -> Tensor:
    """For each box the difference from the nearest other one (B, ); the uncertain ones left out."""
    certain = boxes[1] > cut + NEARLY
    places, scores, labels = (item[certain] for item in boxes)
    if len(others[0]) == 0:
        return torch.full_like(scores, math.inf)
    apart = (places[:, None] - others[0][None]).abs().amax(-1)
    apart = torch.max(apart / places.abs().amax(-1, keepdim=True).clamp(min=1),
                      (scores[:, None] - others[1][None]).abs())
    apart = torch.where(labels[:, None] == others[2][None], apart,
                        torch.full_like(apart, math.inf))
    return apart.amin(1)

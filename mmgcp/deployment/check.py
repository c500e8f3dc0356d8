# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What a detector computes in PyTorch for images of noise, and how far a file is from it."""
import math
from typing import Any, List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from mmgcp.nn.forward import flatten_tensors
from mmgcp.nn.temporarily import eval_mode

from .candidates import decode
from .exported import ExportedModel

TELLING = 20  # candidates that are enough to see what NMS does


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
        is not finite, or there are other outputs.
    """
    with eval_mode(detector):
        expected = flatten_tensors(detector(images, mode='tensor'))
    found = list(exported.run(images).values())
    if len(found) != len(expected):
        return math.inf
    return max(_difference(*pair) for pair in zip(found, expected))


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    places = tuple(range(expected.dim()))[-2:]
    largest = expected.abs().amax(places, keepdim=True).clamp(min=1)
    difference = float(((found - expected).abs() / largest).max())
    return math.inf if math.isnan(difference) else difference


@torch.no_grad()
def predict(detector: nn.Module, images: Tensor, test_cfg: Any,
            with_nms: bool = True, shift: int = 0) -> List[InstanceData]:
    """What a detector itself predicts for images (N, C, H, W), in their pixels.

    Boxes are cut off at the sides of the images, or, if they are shifted right and down by so many
    pixels, as far from them.
    """
    height, width = (side + 2 * shift for side in images.shape[-2:])
    meta = dict(ori_shape=(height, width), img_shape=(height, width), scale_factor=(1., 1.),
                pad_param=[-shift] * 4)
    with eval_mode(detector):
        outputs = detector(images, mode='tensor')
        return detector.bbox_head.predict_by_feat(
            *outputs, batch_img_metas=[meta] * len(images), cfg=test_cfg, rescale=True,
            with_nms=with_nms)


def telling_threshold(detector: nn.Module, images: Tensor, test_cfg: Any) -> Optional[float]:
    """A score that some boxes are above, for a check; None if ``test_cfg`` has such a one."""
    threshold = float(test_cfg.get('score_thr', -1))
    found = predict(detector, images, test_cfg)
    if all(len(item.scores) >= min(TELLING, test_cfg.max_per_img) for item in found):
        return None
    with eval_mode(detector), torch.no_grad():
        _, scores, objectness = decode(detector.bbox_head, detector(images, mode='tensor'), True)
    if objectness is not None:  # which has to pass the threshold by itself, too
        scores = torch.min(scores, objectness[..., None]) * objectness[..., None]
    scores = scores.flatten(1)
    lowest = float(scores.topk(min(TELLING, scores.shape[1]))[0][:, -1].min())
    return min(threshold, lowest / 2)

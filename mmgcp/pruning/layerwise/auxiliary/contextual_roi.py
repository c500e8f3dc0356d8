# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Features of a prior box together with the object that it is to find."""
from typing import Tuple

import torch
from mmcv.ops import roi_align
from torch import Tensor

from .positives import Positives

# Interpolated values for a cell, in either direction. As many as fit, the default of RoIAlign,
# take most of the time of LCP on a CPU.
SAMPLES = 2


def enclosing_boxes(first: Tensor, second: Tensor) -> Tensor:
    """Return the smallest boxes (K, 4) that hold both of K pairs of boxes (x1, y1, x2, y2)."""
    return torch.cat((torch.minimum(first[:, :2], second[:, :2]),
                      torch.maximum(first[:, 2:], second[:, 2:])), 1)


def contextual_roi_align(feature: Tensor, positives: Positives, size: int = 7) -> Tensor:
    """Cut what prior boxes and their objects cover out of a feature map.

    The contextual RoIAlign of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_):
    RoIAlign of the smallest box around both, as a prior box of a shallow layer alone may miss
    most of the object.

    Args:
        feature (Tensor): Feature map (N, C, H, W) of the whole images.
        positives (Positives): K prior boxes and their objects.
        size (int): Cells of the result in either direction. Defaults to 7.

    Returns:
        Tensor: Features (K, C, size, size), each the mean of two by two interpolated values. How
        many pixels a cell of the feature map has is taken from the sizes of the images and the
        map, for each direction by itself.
    """
    boxes = enclosing_boxes(positives.priors, positives.boxes)
    rois = torch.cat((positives.images[:, None].to(boxes), boxes * _scale(feature, positives)), 1)
    # MMCV reads the memory of maps as if they were contiguous
    return roi_align(feature.contiguous(), rois.to(feature), (size, size), 1., SAMPLES, 'avg', True)


def _scale(feature: Tensor, positives: Positives) -> Tensor:
    (height, width), image = feature.shape[-2:], positives.image_size
    scale: Tuple[float, float] = (width / image[1], height / image[0])
    return positives.boxes.new_tensor([*scale, *scale])

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The features of a prior box together with the object that it matches."""
import torch
from mmcv.ops import roi_align
from torch import Tensor

from .positives import Positives

# Interpolated values per cell, along each axis. RoIAlign's default, as many as there are pixels,
# would take most of the time of LCP on a CPU.
SAMPLES = 2


def enclosing_boxes(first: Tensor, second: Tensor) -> Tensor:
    """Return the smallest boxes (K, 4) that contain both of K pairs of boxes (x1, y1, x2, y2)."""
    return torch.cat((torch.minimum(first[:, :2], second[:, :2]),
                      torch.maximum(first[:, 2:], second[:, 2:])), 1)


def contextual_roi_align(feature: Tensor, positives: Positives, size: int = 7) -> Tensor:
    """Crop prior boxes together with their objects from a feature map.

    The contextual RoIAlign of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_):
    RoIAlign of the smallest box around both, as a prior box of a shallow layer alone may miss
    most of the object. How many pixels a cell of the feature map covers follows, for each axis,
    from the sizes of the images and of the map.

    Args:
        feature (Tensor): Feature map (N, C, H, W) of whole images.
        positives (Positives): K prior boxes and their objects.
        size (int): Cells of the result along each axis. Defaults to 7.

    Returns:
        Tensor: Features (K, C, size, size), each the mean of two by two interpolated values.
    """
    boxes = enclosing_boxes(positives.priors, positives.boxes)
    (rows, columns), (height, width) = feature.shape[-2:], positives.image_size
    scale = boxes.new_tensor([columns / width, rows / height]).repeat(2)
    rois = torch.cat((positives.images[:, None].to(boxes), boxes * scale), 1)
    # MMCV reads the memory of maps as if they were contiguous
    return roi_align(feature.contiguous(), rois.to(feature), (size, size), 1., SAMPLES, 'avg', True)

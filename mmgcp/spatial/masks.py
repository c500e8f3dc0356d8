# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The convolutions that say which cells are kept, what they should say, and their loss."""
import math
from typing import Any, List, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import get_world_size
from torch import Tensor

from .settings import SpatialSettings

INITIAL = 0.9  # probability of each cell to be kept before the training


class SpatialMasks(nn.ModuleDict):
    """A 1x1 convolution for each level that decides about the next finer one, by its stride.

    Args:
        channels (dict[int, int]): Number of channels of a level by its stride in pixels.
    """
    not_pruned = ('give the config of the detector without mmgcp.SpatialPruner, which the '
                  'checkpoint fits, too, and put the pruned one into mmgcp.SpatialPruner then')

    def __init__(self, channels: dict):
        super().__init__({str(stride): nn.Conv2d(number, 1, 1)
                          for stride, number in channels.items()})
        for conv in self.values():
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.constant_(conv.bias, math.log(INITIAL / (1 - INITIAL)))

    def logits(self, stride: int, maps: Tensor) -> Tensor:
        """Return the logits (N, 1, H, W) of keeping what is below each cell of a level."""
        return self[str(stride)](maps)


def kept_cells(logits: Tensor, tau: float) -> Tensor:
    """Return which cells (N, 1, H, W) are kept: where 1 - sigmoid(logit) is at most tau."""
    return (-logits).sigmoid() <= tau


def below(keep: Tensor, size: Sequence[int]) -> Tensor:
    """Return which cells of the next finer level, of a size (H, W), are below kept ones."""
    ratio = -(-size[0] // keep.shape[-2])
    keep = keep.repeat_interleave(ratio, 2).repeat_interleave(ratio, 3)
    return keep[:, :, :size[0], :size[1]]


def batch_boxes(data_samples: Any) -> Tensor:
    """Return the boxes of a batch (M, 5): index of the image, x1, y1, x2 and y2 in pixels.

    ``data_samples`` are a list of samples, or a dictionary with ``bboxes_labels`` (M, 6) as of
    MMYOLO's collate function.
    """
    if isinstance(data_samples, dict):
        boxes = data_samples['bboxes_labels']
        return torch.cat((boxes[:, :1], boxes[:, 2:6]), 1)  # a copy: heads may change it
    rows: List[Tensor] = []
    for index, sample in enumerate(data_samples):
        boxes = sample.gt_instances.bboxes
        boxes = getattr(boxes, 'tensor', boxes)
        rows.append(torch.cat((torch.full_like(boxes[:, :1], index), boxes), 1))
    return torch.cat(rows) if rows else torch.zeros(0, 5)


def mask_targets(boxes: Tensor, size: Sequence[int], stride: int, largest: float,
                 window: int) -> Tensor:
    """Say which cells of a level should be kept for the next finer one.

    They are those of a square around the cell with the centre of a box that belongs to a finer
    level, which it does if the root of its area is below ``largest``.

    Args:
        boxes (Tensor): (M, 5), see :func:`batch_boxes`.
        size (Sequence[int]): N, H and W of the level.
        stride (int): Its stride in pixels.
        largest (float): In pixels.
        window (int): Side of the square in cells, an odd number.

    Returns:
        Tensor: Boolean (N, H, W).
    """
    targets = torch.zeros(*size, dtype=torch.bool, device=boxes.device)
    sides = (boxes[:, 3:] - boxes[:, 1:3]).clamp(min=0)
    boxes = boxes[sides.prod(1).sqrt() < largest]
    centres = ((boxes[:, 1:3] + boxes[:, 3:]) / 2 / stride).floor().long()
    steps = torch.arange(window, device=boxes.device) - window // 2
    columns = (centres[:, 0, None, None] + steps).expand(-1, window, -1)
    rows = (centres[:, 1, None, None] + steps[:, None]).expand(-1, -1, window)
    images = boxes[:, 0].long()[:, None, None].expand_as(rows)
    found = (rows >= 0) & (rows < size[1]) & (columns >= 0) & (columns < size[2])
    targets[images[found], rows[found], columns[found]] = True
    return targets


def focal_loss(logits: Tensor, targets: Tensor, gamma: float, alpha: float) -> Tensor:
    """Return the mean focal loss (`arXiv 1708.02002 <https://arxiv.org/abs/1708.02002>`_, eq. 5).

    The logits and the boolean targets have the same shape.
    """
    logits, truth = logits.float(), targets.float()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction='none')
    wrong = torch.where(targets, (-logits).sigmoid(), logits.sigmoid())
    return (truth * alpha + (1 - truth) * (1 - alpha)).mul(wrong**gamma * cross_entropy).mean()


def mask_loss(logits: Sequence[Tensor], boxes: Tensor, strides: Sequence[int],
              settings: SpatialSettings) -> Tensor:
    """Return the weighted loss of all masks, the mean over the levels that decide.

    Like MMYOLO's losses, it is multiplied by the number of images and of processes.

    Args:
        logits (Sequence[Tensor]): (N, 1, H, W) for each level that decides, finest first.
        boxes (Tensor): See :func:`batch_boxes`.
        strides (Sequence[int]): Strides in pixels of the finest level and of those that decide.
        settings (SpatialSettings): The settings.

    Returns:
        Tensor: A scalar.
    """
    losses = []
    for maps, finer, stride in zip(logits, strides, strides[1:]):
        targets = mask_targets(boxes.to(maps.device), (len(maps), *maps.shape[-2:]), stride,
                               settings.box_cells * finer, settings.window)
        losses.append(focal_loss(maps[:, 0], targets, settings.gamma, settings.alpha))
    factor = settings.loss_weight * len(logits[0]) * get_world_size()
    return factor * torch.stack(losses).mean()

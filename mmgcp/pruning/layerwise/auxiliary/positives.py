# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Matches of prior boxes with the objects of training images."""
from dataclasses import dataclass
from typing import List, NamedTuple, Tuple

import torch
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from torch import Tensor

from mmgcp.nn.training_loss import Batch


class GroundTruth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes (Tensor): Boxes (G, 4) as (x1, y1, x2, y2) in pixels of the batch.
        labels (Tensor): Class indices (G, ).
    """
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Positives:
    """K pairs of a prior box and an object that it matches, in a batch of images.

    Attributes:
        images (Tensor): Index (K, ) of the image in the batch.
        priors (Tensor): Prior boxes (K, 4) as (x1, y1, x2, y2) in pixels.
        boxes (Tensor): Boxes (K, 4) of the objects.
        labels (Tensor): Class indices (K, ) of the objects.
        image_size (tuple[int, int]): Height and width of the images in pixels.
    """
    images: Tensor
    priors: Tensor
    boxes: Tensor
    labels: Tensor
    image_size: Tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)


def read_ground_truth(batch: Batch) -> List[GroundTruth]:
    """Read the objects of each image, without boxes that have no area.

    Args:
        batch (Batch): Its data samples are a list of MMDetection's data samples, or a dictionary
            of MMYOLO's with ``bboxes_labels`` (M, 6): image, class and box.

    Returns:
        list[GroundTruth]: The objects, image by image.
    """
    samples = batch.data_samples
    if isinstance(samples, dict):
        rows = samples['bboxes_labels']
        truths = [rows[rows[:, 0] == number] for number in range(len(batch.images))]
        truths = [GroundTruth(rows[:, 2:6], rows[:, 1].long()) for rows in truths]
    else:
        truths = [GroundTruth(get_box_tensor(sample.gt_instances.bboxes),
                              sample.gt_instances.labels) for sample in samples]
    return [_with_area(truth) for truth in truths]


def _with_area(truth: GroundTruth) -> GroundTruth:
    keep = (truth.boxes[:, 2:] > truth.boxes[:, :2]).all(1)
    return GroundTruth(truth.boxes[keep], truth.labels[keep])


def match(priors: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Match prior boxes with objects by their intersection over union (IoU).

    A prior box matches the object that it overlaps most, if their IoU reaches the threshold. An
    object that is matched by none of them is matched by the prior box that overlaps it most, as in
    SSD (`arXiv 1512.02325 <https://arxiv.org/abs/1512.02325>`_, section 2.2).

    Args:
        priors (Tensor): Prior boxes (P, 4).
        boxes (Tensor): Boxes (G, 4) of the objects.
        threshold (float): The least IoU.

    Returns:
        Tensor: Pairs (K, 2) of the indices of an object and a prior box, ascending.
    """
    if not len(boxes):
        return boxes.new_zeros(0, 2, dtype=torch.long)
    ious = bbox_overlaps(boxes.float(), priors)
    best, owners = ious.max(0)
    matched = torch.zeros_like(ious, dtype=torch.bool)
    matched[owners, torch.arange(len(priors), device=owners.device)] = best >= threshold
    highest, closest = ious.max(1)
    unmatched = (~matched.any(1) & (highest > 0)).nonzero().flatten()
    matched[unmatched, closest[unmatched]] = True
    return matched.nonzero()


def thin_out(rows: Tensor, number: int) -> Tensor:
    """Return at most this number of the rows of a tensor (K, ...), evenly spaced."""
    if len(rows) <= number:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, number, device=rows.device).long()]


def find_positives(priors: Tensor, batch: Batch, threshold: float = 0.5,
                   max_positives: int = 64) -> Positives:
    """Find the prior boxes of a batch that match objects; see :func:`match`.

    Args:
        priors (Tensor): Prior boxes (P, 4), the same for all images.
        batch (Batch): The images and their ground truth.
        threshold (float): The least IoU. Defaults to 0.5.
        max_positives (int): Largest number of matches in an image. If there are more, they are
            thinned out evenly over its objects and levels. Defaults to 64.

    Returns:
        Positives: The matches, image by image.
    """
    parts = []
    for number, truth in enumerate(read_ground_truth(batch)):
        objects, chosen = thin_out(match(priors, truth.boxes, threshold), max_positives).unbind(1)
        parts.append((torch.full_like(objects, number), priors[chosen],
                      truth.boxes[objects].to(priors), truth.labels[objects]))
    return Positives(*(torch.cat(column) for column in zip(*parts)),
                     image_size=tuple(batch.images.shape[-2:]))

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Prior boxes of any dense head that match ground truth."""
from dataclasses import dataclass
from typing import List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch


class GroundTruth(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes (Tensor): Boxes (G, 4) as (x1, y1, x2, y2) in pixels of the batch.
        labels (Tensor): Numbers (G, ) of their classes.
    """
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Positives:
    """K pairs of a prior box and an object that it matches, in a batch of images.

    Attributes:
        images (Tensor): Number (K, ) of the image in the batch.
        priors (Tensor): Prior boxes (K, 4) as (x1, y1, x2, y2) in pixels.
        boxes (Tensor): Boxes (K, 4) of the objects.
        labels (Tensor): Numbers (K, ) of their classes.
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
    """Read the objects of each image; boxes without an area are left out.

    Args:
        batch (Batch): Its data samples are a list of MMDetection's, or MMYOLO's dictionary
            with ``bboxes_labels`` (M, 6): image, class and box.

    Returns:
        list[GroundTruth]: The objects, image after image.
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


def dense_head(model: nn.Module) -> nn.Module:
    """Return the head of a detector that has prior boxes or points.

    Args:
        model (nn.Module): A single-stage or two-stage detector.

    Returns:
        nn.Module: Its dense head; of two stages, that which proposes regions.

    Raises:
        PruningError: It has no such head.
    """
    for name in ('bbox_head', 'rpn_head'):
        head = getattr(model, name, None)
        if hasattr(head, 'prior_generator'):
            return head
    raise PruningError('the criterion needs a detector whose head has anchors or points '
                       f'(prior_generator), but the {type(model).__name__} has none')


def number_of_classes(model: nn.Module) -> int:
    """Return how many classes of objects a detector tells apart.

    Args:
        model (nn.Module): A single-stage or two-stage detector.

    Returns:
        int: The number, without the background.

    Raises:
        PruningError: Its head does not say.
    """
    head = getattr(getattr(model, 'roi_head', model), 'bbox_head', None)
    head = head[0] if isinstance(head, nn.ModuleList) else head
    if not hasattr(head, 'num_classes'):
        raise PruningError('the criterion needs a detector whose head has num_classes, but the '
                           f'{type(model).__name__} has none')
    return head.num_classes


class PriorBoxes:
    """The prior boxes of a detector for images of some size.

    Anchors are taken as they are, from the first level to the last. Heads with points get
    square boxes around them, with sides of some multiples of the level's stride.

    Args:
        point_scales (Sequence[float]): These multiples. Defaults to (2, 4, 8).
    """

    def __init__(self, point_scales: Sequence[float] = (2, 4, 8)):
        self.point_scales = tuple(point_scales)
        self._last: Tuple[tuple, Tensor] = ((), torch.empty(0, 4))

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the prior boxes (P, 4) as (x1, y1, x2, y2) in pixels.

        Args:
            model (nn.Module): The detector. It is run if the last images had another size.
            images (Tensor): Images (N, C, H, W).
        """
        key = (id(model), images.shape[-2:], images.device)
        if self._last[0] != key:
            self._last = (key, self._make(model, images[:1]))
        return self._last[1]

    @torch.no_grad()
    def _make(self, model: nn.Module, images: Tensor) -> Tensor:
        generator = dense_head(model).prior_generator
        sizes = [feature.shape[-2:] for feature in model.extract_feat(images)]
        if len(sizes) != generator.num_levels:
            raise PruningError(f'the head has priors for {generator.num_levels} levels, but gets '
                               f'{len(sizes)} feature maps')
        levels = generator.grid_priors(sizes, dtype=torch.float32, device=images.device)
        if levels[0].shape[1] == 4:
            return torch.cat(levels)
        return torch.cat([_squares(points, scale * max(stride))
                          for points, stride in zip(levels, generator.strides)
                          for scale in self.point_scales])


def _squares(centres: Tensor, side: float) -> Tensor:
    return torch.cat((centres - side / 2, centres + side / 2), 1)


def match(priors: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Match prior boxes with objects by their intersection over union (IoU).

    A prior box matches the object it overlaps most, if the IoU is at least the threshold.
    An object that none matches so gets the one that overlaps it most, as in `SSD
    <https://arxiv.org/abs/1512.02325>`_.

    Args:
        priors (Tensor): Prior boxes (P, 4).
        boxes (Tensor): Boxes (G, 4) of the objects.
        threshold (float): The least IoU.

    Returns:
        Tensor: Pairs (K, 2) of numbers of an object and a prior box, ascending.
    """
    if not len(boxes):
        return boxes.new_zeros(0, 2, dtype=torch.long)
    ious = bbox_overlaps(boxes.float(), priors)
    best, owners = ious.max(0)
    matched = torch.zeros_like(ious, dtype=torch.bool)
    matched[owners, torch.arange(len(priors), device=owners.device)] = best >= threshold
    highest, closest = ious.max(1)
    alone = (~matched.any(1) & (highest > 0)).nonzero().flatten()
    matched[alone, closest[alone]] = True
    return matched.nonzero()


def thin_out(pairs: Tensor, number: int) -> Tensor:
    """Return at most so many of the rows (K, ...), evenly spread."""
    if len(pairs) <= number:
        return pairs
    return pairs[torch.linspace(0, len(pairs) - 1, number, device=pairs.device).long()]


def find_positives(priors: Tensor, batch: Batch, threshold: float = 0.5,
                   max_positives: int = 64) -> Positives:
    """Find the prior boxes of a batch that match objects; see :func:`match`.

    Args:
        priors (Tensor): Prior boxes (P, 4), the same for all images.
        batch (Batch): The images and their ground truth.
        threshold (float): The least IoU. Defaults to 0.5.
        max_positives (int): At most so many of each image, evenly spread over its objects
            and levels. Defaults to 64.

    Returns:
        Positives: The matches, image after image.
    """
    parts = []
    for number, truth in enumerate(read_ground_truth(batch)):
        objects, chosen = thin_out(match(priors, truth.boxes, threshold), max_positives).unbind(1)
        parts.append((torch.full_like(objects, number), priors[chosen],
                      truth.boxes[objects].to(priors), truth.labels[objects]))
    return Positives(*(torch.cat(column) for column in zip(*parts)),
                     image_size=tuple(batch.images.shape[-2:]))

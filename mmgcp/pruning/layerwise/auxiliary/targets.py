# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What auxiliary networks have to predict: objects, and the prior boxes that match them."""
from dataclasses import dataclass
from typing import List, NamedTuple, Sequence, Tuple

import torch
import torch.nn as nn
from mmdet.structures.bbox import bbox_overlaps, get_box_tensor
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.lookup import number_of_classes
from mmgcp.nn.training_loss import Batch


def dense_head(model: nn.Module) -> nn.Module:
    """Return the head with prior boxes or points; of two stages the one that proposes regions."""
    for name in ('bbox_head', 'rpn_head'):
        head = getattr(model, name, None)
        if hasattr(head, 'prior_generator'):
            return head
    raise PruningError('the criterion needs a detector whose head has anchors or points '
                       f'(prior_generator), but the {type(model).__name__} has none')


def classes_of(model: nn.Module) -> int:
    """Return the number of classes that a detector distinguishes, without the background."""
    number = number_of_classes(model)
    if number is None:
        raise PruningError('the criterion needs a detector whose head has num_classes, but the '
                           f'{type(model).__name__} has none')
    return number


class PriorBoxes:
    """The prior boxes of a detector for images of any size.

    Anchors are taken as they are, from the first level to the last. For heads with points they
    are squares around the points, whose sides are ``point_scales`` times the level's stride.
    """

    def __init__(self, point_scales: Sequence[float] = (2, 4, 8)):
        self._point_scales = tuple(point_scales)
        self._last: Tuple[tuple, Tensor] = ((), torch.empty(0, 4))

    @torch.no_grad()
    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the prior boxes (P, 4) as (x1, y1, x2, y2) in pixels for images (N, C, H, W).

        The detector runs if the last images had another size. Raises a PruningError if its head
        has no priors, or not for as many feature maps as it gets.
        """
        key = (id(model), images.shape[-2:], images.device)
        if self._last[0] == key:
            return self._last[1]
        generator = dense_head(model).prior_generator
        sizes = [feature.shape[-2:] for feature in model.extract_feat(images[:1])]
        if len(sizes) != generator.num_levels:
            raise PruningError(f'the head has priors for {generator.num_levels} levels, but gets '
                               f'{len(sizes)} feature maps')
        levels = generator.grid_priors(sizes, dtype=torch.float32, device=images.device)
        if levels[0].shape[1] != 4:
            levels = [torch.cat((points - scale * max(stride) / 2,
                                 points + scale * max(stride) / 2), 1)
                      for points, stride in zip(levels, generator.strides)
                      for scale in self._point_scales]
        self._last = (key, torch.cat(levels))
        return self._last[1]


class GroundTruth(NamedTuple):
    """The G objects of an image: boxes (x1, y1, x2, y2) in pixels of the batch, and classes."""
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Positives:
    """K pairs of a prior box and an object that it matches, in a batch of images.

    Boxes (K, 4) are (x1, y1, x2, y2) in pixels.
    """
    images: Tensor  # indices (K, ) in the batch
    priors: Tensor
    boxes: Tensor  # of the objects
    labels: Tensor  # class indices (K, ) of the objects
    image_size: Tuple[int, int]  # height and width in pixels

    def __len__(self) -> int:
        return len(self.images)


def read_ground_truth(batch: Batch) -> List[GroundTruth]:
    """Read the objects of each image, without boxes that have no area.

    The data samples of the batch are a list of MMDetection's, or a dictionary of MMYOLO's with
    ``bboxes_labels`` (M, 6): image, class and box.
    """
    samples = batch.data_samples
    if isinstance(samples, dict):
        rows = samples['bboxes_labels']
        images = [rows[rows[:, 0] == number] for number in range(len(batch.images))]
        truths = [(rows[:, 2:6], rows[:, 1].long()) for rows in images]
    else:
        truths = [(get_box_tensor(sample.gt_instances.bboxes), sample.gt_instances.labels)
                  for sample in samples]
    have_area = [(boxes[:, 2:] > boxes[:, :2]).all(1) for boxes, _ in truths]
    return [GroundTruth(boxes[keep], labels[keep])
            for (boxes, labels), keep in zip(truths, have_area)]


def match(priors: Tensor, boxes: Tensor, threshold: float) -> Tensor:
    """Match prior boxes (P, 4) with boxes (G, 4) of objects by intersection over union (IoU).

    A prior box matches the object that it overlaps most, if their IoU reaches the threshold. An
    object that is matched by none of them is matched by the prior box that overlaps it most, as in
    SSD (`arXiv 1512.02325 <https://arxiv.org/abs/1512.02325>`_, section 2.2). Return pairs (K, 2)
    of the indices of an object and a prior box, ascending.
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
    steps = torch.arange(number, device=rows.device) * (len(rows) - 1)
    return rows[torch.div(steps, max(number - 1, 1), rounding_mode='floor')]


def find_positives(priors: Tensor, batch: Batch, threshold: float = 0.5,
                   max_positives: int = 64) -> Positives:
    """Find the prior boxes (P, 4), the same for all images, that match objects; see :func:`match`.

    If more than ``max_positives`` match in an image, they are thinned out evenly over its objects
    and levels.
    """
    parts = []
    for number, truth in enumerate(read_ground_truth(batch)):
        objects, chosen = thin_out(match(priors, truth.boxes, threshold), max_positives).unbind(1)
        parts.append((torch.full_like(objects, number), priors[chosen],
                      truth.boxes[objects].to(priors), truth.labels[objects]))
    return Positives(*(torch.cat(column) for column in zip(*parts)),
                     image_size=tuple(batch.images.shape[-2:]))

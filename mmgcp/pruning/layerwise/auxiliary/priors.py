# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The prior boxes of a detector's head."""
from typing import Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError


def dense_head(model: nn.Module) -> nn.Module:
    """Return the head of a detector that has prior boxes or points.

    Of a two-stage detector, this is the one that proposes regions.
    """
    for name in ('bbox_head', 'rpn_head'):
        head = getattr(model, name, None)
        if hasattr(head, 'prior_generator'):
            return head
    raise PruningError('the criterion needs a detector whose head has anchors or points '
                       f'(prior_generator), but the {type(model).__name__} has none')


def number_of_classes(model: nn.Module) -> int:
    """Return the number of classes that a detector distinguishes, without the background."""
    head = getattr(getattr(model, 'roi_head', model), 'bbox_head', None)
    head = head[0] if isinstance(head, nn.ModuleList) else head
    if not hasattr(head, 'num_classes'):
        raise PruningError('the criterion needs a detector whose head has num_classes, but the '
                           f'{type(model).__name__} has none')
    return head.num_classes


class PriorBoxes:
    """The prior boxes of a detector for images of any size.

    Anchors are taken as they are, from the first level to the last. For heads with points they
    are squares around the points, whose sides are ``point_scales`` times the level's stride.
    """

    def __init__(self, point_scales: Sequence[float] = (2, 4, 8)):
        self._point_scales = tuple(point_scales)
        self._last: Tuple[tuple, Tensor] = ((), torch.empty(0, 4))

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the prior boxes (P, 4) as (x1, y1, x2, y2) in pixels for images (N, C, H, W).

        The detector runs if the last images had another size. Raises a PruningError if its head
        has no priors, or not for as many feature maps as it gets.
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
        halves = [(points, scale * max(stride) / 2)
                  for points, stride in zip(levels, generator.strides)
                  for scale in self._point_scales]
        return torch.cat([torch.cat((points - half, points + half), 1) for points, half in halves])

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The prior boxes of a detector's head."""
from typing import Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError


def dense_head(model: nn.Module) -> nn.Module:
    """Return the head of a detector that has prior boxes or points.

    Args:
        model (nn.Module): A single-stage or two-stage detector.

    Returns:
        nn.Module: The dense head; of a two-stage detector, the one that proposes regions.

    Raises:
        PruningError: There is no such head.
    """
    for name in ('bbox_head', 'rpn_head'):
        head = getattr(model, name, None)
        if hasattr(head, 'prior_generator'):
            return head
    raise PruningError('the criterion needs a detector whose head has anchors or points '
                       f'(prior_generator), but the {type(model).__name__} has none')


def number_of_classes(model: nn.Module) -> int:
    """Return the number of classes that a detector distinguishes, without the background.

    Args:
        model (nn.Module): A single-stage or two-stage detector.

    Raises:
        PruningError: Its head does not have this number.
    """
    head = getattr(getattr(model, 'roi_head', model), 'bbox_head', None)
    head = head[0] if isinstance(head, nn.ModuleList) else head
    if not hasattr(head, 'num_classes'):
        raise PruningError('the criterion needs a detector whose head has num_classes, but the '
                           f'{type(model).__name__} has none')
    return head.num_classes


class PriorBoxes:
    """The prior boxes of a detector for images of any size.

    Anchors are taken as they are, from the first level to the last. For heads with points they
    are squares around the points, whose sides are multiples of the level's stride.

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

        Raises:
            PruningError: The head has no priors, or not for as many feature maps as it gets.
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

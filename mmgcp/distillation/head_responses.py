# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The predictions of MMYOLO's heads in one form."""
from dataclasses import dataclass
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError


@dataclass
class Responses:
    """P predictions for each of N images, level after level, in single precision.

    Attributes:
        scores (Tensor): Raw class scores (N, P, num_classes).
        boxes (Tensor): Decoded boxes (N, P, 4) as (x1, y1, x2, y2) in pixels.
        objectnesses (Tensor, optional): Raw objectnesses (N, P).
        strides (Tensor): Stride (P, ) of the predictions in pixels.
    """
    scores: Tensor
    boxes: Tensor
    objectnesses: Optional[Tensor]
    strides: Tensor

    @property
    def confidences(self) -> Tensor:
        """Tensor: Best class score times objectness (N, P)."""
        confidences = self.scores.max(-1).values.sigmoid()
        if self.objectnesses is not None:
            confidences = confidences * self.objectnesses.sigmoid()
        return confidences


def check_head(model: nn.Module, owner: str) -> None:
    """Check that :func:`read_responses` understands a detector's head.

    Args:
        model (nn.Module): The detector.
        owner (str): What to call it in an error.

    Raises:
        UserError: It has no head of MMYOLO's.
    """
    head = getattr(model, 'bbox_head', None)
    parts = ('head_module', 'prior_generator', 'bbox_coder', 'featmap_strides')
    if not all(hasattr(head, part) for part in parts):
        raise UserError("distilling the response needs a head of MMYOLO's, but the head of the "
                        f'{owner} is a {type(head).__name__}')


def read_responses(head: nn.Module, outputs: Sequence[Sequence[Tensor]]) -> Responses:
    """Read what the layers of a head returned, and decode the boxes with its own coder.

    The heads return class scores (N, A * num_classes, H, W) and box predictions
    (N, A * 4, H, W) of each level with A anchors, and those that have objectnesses return
    these (N, A, H, W) in the third place. What others have there (in training, the
    distributions that the boxes come from) and all further outputs are left out, and so are
    the auxiliary predictions of YOLOv7-P6.

    Args:
        head (nn.Module): A dense head of MMYOLO's.
        outputs (Sequence[Sequence[Tensor]]): What its ``head_module`` returned.

    Returns:
        Responses: The predictions.
    """
    scores, boxes = (_main(levels) for levels in outputs[:2])
    sizes = [score.shape[-2:] for score in scores]
    objectnesses = None
    if len(outputs) > 2:
        third, num_anchors = _main(outputs[2]), head.num_base_priors
        if all(isinstance(level, Tensor) and level.shape[1:] == (num_anchors, *size)
               for level, size in zip(third, sizes)):
            objectnesses = _flatten(third, 1).squeeze(-1)
    priors = head.prior_generator.grid_priors(
        sizes, dtype=torch.float32, device=scores[0].device)
    strides = torch.cat([prior.new_full((len(prior), ), stride)
                         for prior, stride in zip(priors, head.featmap_strides)])
    decoded = head.bbox_coder.decode(torch.cat(priors)[None], _flatten(boxes, 4), strides)
    return Responses(_flatten(scores, head.num_classes), decoded, objectnesses, strides)


def _main(levels: Sequence) -> List[Tensor]:
    """The main predictions where there are auxiliary ones beside them."""
    return [level[0] if isinstance(level, (list, tuple)) else level for level in levels]


def _flatten(levels: Sequence[Tensor], width: int) -> Tensor:
    """Levels of (N, A * width, H, W) to (N, all H * W * A, width)."""
    return torch.cat([level.float().permute(0, 2, 3, 1).reshape(len(level), -1, width)
                      for level in levels], dim=1)

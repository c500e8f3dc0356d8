# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The predictions of heads in one form, read from a run of the head."""
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
import torch.nn as nn
from mmdet.models.dense_heads import GFLHead
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.nn.hooks import on_inputs, on_outputs, recording

HEAD = 'bbox_head'


@dataclass
class Responses:
    """P predictions for each of N images, level by level, in single precision.

    Attributes:
        scores (Tensor): Raw class scores (N, P, num_classes).
        boxes (Tensor): Decoded boxes (N, P, 4) as (x1, y1, x2, y2) in pixels.
        objectnesses (Tensor, optional): Raw objectnesses (N, P).
        strides (Tensor): Stride (P, ) of the predictions in pixels.
        edges (Tensor, optional): Raw scores (N, P, 4, B) of the distances 0, 1, ..., B - 1 in
            units of the stride at which the left, upper, right and lower edge may be.
    """
    scores: Tensor
    boxes: Tensor
    objectnesses: Optional[Tensor]
    strides: Tensor
    edges: Optional[Tensor] = None

    @property
    def confidences(self) -> Tensor:
        """Best class score times objectness (N, P)."""
        confidences = self.scores.max(-1).values.sigmoid()
        if self.objectnesses is not None:
            confidences = confidences * self.objectnesses.sigmoid()
        return confidences


@dataclass
class HeadRun:
    """What a detector's head read and returned in one run.

    Attributes:
        model (nn.Module): The detector.
        features (tuple[Tensor]): What the head read, (N, C, H, W) for each level.
        outputs (tuple): What it returned.
        layer_inputs (dict[str, list[Tensor]]): What some of its layers read, call by call.
    """
    model: nn.Module
    features: Any = None
    outputs: Any = None
    layer_inputs: Dict[str, List[Tensor]] = field(default_factory=dict)

    @cached_property
    def responses(self) -> Responses:
        """The predictions."""
        return read_responses(self.model.bbox_head, self.outputs)

    def repeat(self, layer_inputs: Dict[str, List[Tensor]]) -> Responses:
        """Run the head again on the same features, but let some layers read something else.

        Returns the predictions. The inputs of the layers are given by name, call by call.
        """
        rest = {name: iter(inputs) for name, inputs in layer_inputs.items()}
        with on_inputs(self.model, {name: partial(_take, inputs)
                                    for name, inputs in rest.items()}):
            return read_responses(self.model.bbox_head, self.model.bbox_head(self.features))


def _take(rest: Iterator[Tensor], _: Any) -> Tensor:
    """Return the next input of a layer, whatever it would have read."""
    return next(rest)


@contextmanager
def recording_head(model: nn.Module, layers: Iterable[str] = ()) -> Iterator[HeadRun]:
    """Record a run of a detector's head and what some layers read, complete at the end."""
    run = HeadRun(model)

    def note(features: Any, outputs: Any) -> None:
        run.features, run.outputs = features, outputs

    with on_outputs(model, {HEAD: note}), \
            recording(model, layers, inputs=True) as run.layer_inputs:
        yield run


def can_be_read(model: nn.Module) -> bool:
    """Whether a model is a detector whose head's predictions can be read."""
    head = getattr(model, HEAD, None)
    parts = ('head_module', 'prior_generator', 'bbox_coder', 'featmap_strides')
    return isinstance(head, GFLHead) or all(hasattr(head, part) for part in parts)


def check_head(model: nn.Module, owner: str) -> None:
    """Raise a UserError if a detector's head is none that can be read."""
    if not can_be_read(model):
        raise UserError("response needs heads of MMYOLO's or MMDetection's GFLHead, but the head "
                        f'of the {owner} is a {type(getattr(model, HEAD, None)).__name__}')


def count_distances(head: nn.Module) -> int:
    """Count the distances of the distributions that a head predicts edges by, 0 if it does not."""
    if isinstance(head, GFLHead):
        return head.reg_max + 1
    projection = getattr(head.head_module, 'proj', None)
    return len(projection) if isinstance(projection, Tensor) and len(projection) > 1 else 0


def show_distributions(model: nn.Module) -> None:
    """Let a head of MMYOLO's return distributions in eval mode, too, if it predicts any.

    Its ``head_module`` says that it is in training mode, which decides on nothing else; the
    layers in it stay as they are.
    """
    head = model.bbox_head
    if count_distances(head) and not isinstance(head, GFLHead):
        head.head_module.training = True


def read_responses(head: nn.Module, outputs: Sequence[Sequence[Tensor]]) -> Responses:
    """Read what a head returned, and decode the boxes with its own coder.

    On each level with A anchors, MMYOLO's heads return class scores (N, A * num_classes, H, W) and
    box predictions (N, A * 4, H, W); those with objectnesses return these (N, A, H, W) in the
    third place, and those that compute boxes from distributions return these
    (N, H * W, 4, B) there in training mode. All further outputs and the auxiliary predictions of
    YOLOv7-P6 are ignored. GFLHead returns the distributions (N, 4 * B, H, W) instead of boxes.
    """
    if isinstance(head, GFLHead):
        return _read_gfl(head, *outputs)
    scores, boxes = (_main(levels) for levels in outputs[:2])
    sizes = [score.shape[-2:] for score in scores]
    objectnesses = edges = None
    if len(outputs) > 2:
        third, num_anchors = _main(outputs[2]), head.num_base_priors
        if _have_shapes(third, [(num_anchors, *size) for size in sizes]):
            objectnesses = _flatten(third, 1).squeeze(-1)
        elif _have_shapes(third, [(height * width, 4, count_distances(head))
                                  for height, width in sizes]):
            edges = torch.cat([level.float() for level in third], dim=1)
    priors = head.prior_generator.grid_priors(
        sizes, dtype=torch.float32, device=scores[0].device)
    strides = _strides(priors, head.featmap_strides)
    decoded = head.bbox_coder.decode(torch.cat(priors)[None], _flatten(boxes, 4), strides)
    return Responses(_flatten(scores, head.num_classes), decoded, objectnesses, strides, edges)


def _read_gfl(head: GFLHead, scores: Sequence[Tensor],
              distributions: Sequence[Tensor]) -> Responses:
    sizes = [score.shape[-2:] for score in scores]
    anchors = head.prior_generator.grid_priors(
        sizes, dtype=torch.float32, device=scores[0].device)
    strides = _strides(anchors, [stride for stride, _ in head.prior_generator.strides])
    edges = _flatten(distributions, 4 * count_distances(head))
    edges = edges.reshape(*edges.shape[:2], 4, -1)
    distances = (edges.softmax(-1) * torch.arange(edges.shape[-1]).to(edges)).sum(-1)
    centers = head.anchor_center(torch.cat(anchors)).expand(len(distances), -1, -1)
    boxes = head.bbox_coder.decode(centers, distances * strides[:, None])
    return Responses(_flatten(scores, head.cls_out_channels), boxes, None, strides, edges)


def check_same(student: Responses, teacher: Responses) -> None:
    """Raise a UserError if the predictions of student and teacher do not correspond."""
    shapes = tuple(student.scores.shape), tuple(teacher.scores.shape)
    if shapes[0] != shapes[1]:
        raise UserError('the heads of student and teacher must make the same predictions, but '
                        f'their scores (images, predictions, classes) are {shapes[0]} and '
                        f'{shapes[1]}')
    if (student.objectnesses is None) != (teacher.objectnesses is None):
        raise UserError('the heads of student and teacher must both have objectnesses or both '
                        'have none')


def _main(levels: Sequence) -> List[Tensor]:
    """Return the main predictions of levels that may also have auxiliary ones."""
    return [level[0] if isinstance(level, (list, tuple)) else level for level in levels]


def _have_shapes(levels: Sequence, shapes: Sequence[tuple]) -> bool:
    """Whether all levels are tensors of the given shapes, apart from the number of images."""
    return all(isinstance(level, Tensor) and level.shape[1:] == shape
               for level, shape in zip(levels, shapes))


def _strides(priors: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
    """Return the stride of each prior of all levels."""
    return torch.cat([prior.new_full((len(prior), ), stride)
                      for prior, stride in zip(priors, strides)])


def _flatten(levels: Sequence[Tensor], width: int) -> Tensor:
    """Turn levels of (N, A * width, H, W) into (N, all H * W * A, width)."""
    return torch.cat([level.float().permute(0, 2, 3, 1).reshape(len(level), -1, width)
                      for level in levels], dim=1)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors as functions of images whose results are a flat tuple of tensors."""
import inspect
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.nn as nn
from mmyolo.models import YOLOv5Head
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.nn.forward import flatten_tensors, run_on_noise

from .candidates import BestBoxes, decode

DETECTIONS = ('boxes', 'scores', 'labels')


class RawPredictions(nn.Module):
    """What a detector's head emits, level by level, not decoded.

    Args:
        detector (nn.Module): A detector of one stage.

    Raises:
        UserError: The detector has two stages.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        if not hasattr(detector, 'bbox_head'):
            raise UserError(f'a {type(detector).__name__} cannot be exported: only detectors of '
                            'one stage can')
        self.detector = detector

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Return the tensors for images (N, C, H, W)."""
        return tuple(flatten_tensors(self.detector(images, mode='tensor')))

    def output_names(self, shape: Sequence[int]) -> List[str]:
        """Name the outputs for an image (C, H, W): as ``predict_by_feat`` calls them, by level."""
        outputs = run_on_noise(self.detector, shape)
        kinds = list(inspect.signature(self.detector.bbox_head.predict_by_feat).parameters)
        names = []
        for kind, levels in zip(kinds, outputs):
            single = isinstance(levels, Tensor)
            names += [kind] if single else [f'{kind}_{level}' for level in range(len(levels))]
        return names


def nested(tensors: Dict[str, Any]) -> List[Any]:
    """Undo what :class:`RawPredictions` did: arguments for ``predict_by_feat``, from its names."""
    kinds: Dict[str, Any] = {}
    for name, tensor in tensors.items():
        kind, _, level = name.rpartition('_')
        if level.isdigit():
            kinds.setdefault(kind, []).append(tensor)
        else:
            kinds[name] = tensor
    return list(kinds.values())


class Detections(nn.Module):
    """Boxes, scores and labels that a detector finds, in pixels of the images it reads.

    Args:
        detector (nn.Module): A detector of MMYOLO.
        fixed_size (bool): Whether it will only run on images of one size.

    Raises:
        UserError: It cannot be decoded here.
    """

    def __init__(self, detector: nn.Module, fixed_size: bool = True):
        super().__init__()
        head = getattr(detector, 'bbox_head', None)
        usual = YOLOv5Head.predict_by_feat
        if getattr(type(head), 'predict_by_feat', None) is not usual:
            kind = type(detector if head is None else head).__name__
            raise UserError(f'the predictions of a {kind} cannot be decoded in the file: export '
                            'the raw outputs')
        self.detector = detector
        self.fixed_size = fixed_size
        self.best_boxes = BestBoxes(head.test_cfg, head.num_classes, fixed_size)

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Return boxes (N, K, 4), scores (N, K), labels (N, K); see :class:`BestBoxes`."""
        head = self.detector.bbox_head
        boxes, scores, labels = self.best_boxes(
            *decode(head, self.detector(images, mode='tensor'), self.fixed_size))
        height, width = torch._shape_as_tensor(images)[-2:].to(boxes).split(1)
        boxes = torch.min(boxes.clamp(min=0), torch.cat((width, height, width, height)))
        return boxes, scores, labels

    @staticmethod
    def output_names(shape: Sequence[int]) -> List[str]:
        """Name the outputs."""
        return list(DETECTIONS)

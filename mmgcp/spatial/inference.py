# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Computing only the kept cells of the finest levels of a detector, in its hooks."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch.nn as nn
from mmdet.structures import OptSampleList, SampleList
from torch import Tensor

from .level_layers import LevelLayers
from .masks import SpatialMasks, batch_boxes, below, kept_cells, mask_loss
from .settings import SpatialSettings
from .tiles import active_places

ATTRIBUTE = 'spatial_masks'  # of a detector with a pruner
NO_SCORE = -1e4  # a raw score whose sigmoid is 0, also in half precision


class Deferred:
    """Stands for what a part of the neck emits, until it is known which cells are kept."""

    def __init__(self, *inputs: Tensor):
        self.inputs = inputs


class SpatialInference:
    """Prunes cells while a detector predicts, and adds the loss of the masks to its losses.

    Everything else that is done with the detector, such as running it with ``mode='tensor'``,
    is dense. Its parts are held here, so that copies of the detector have this, too.

    Args:
        detector (nn.Module): The detector.
        masks (SpatialMasks): Its masks.
        layers (Sequence[LevelLayers]): Of each pruned level, the finest first.
        strides (Sequence[int]): Strides in pixels of the finest levels, up to the last that
            decides.
        score_kinds (Sequence[bool]): Which kinds of predictions are scores.
        settings (SpatialSettings): The settings.

    Attributes:
        kept (dict[int, float]): Share of the cells that the last prediction kept, by stride.
        computed (dict[int, float]): Share of the tiles with kept cells, by stride.
    """

    def __init__(self, detector: nn.Module, masks: SpatialMasks, layers: Sequence[LevelLayers],
                 strides: Sequence[int], score_kinds: Sequence[bool],
                 settings: SpatialSettings) -> None:
        self.detector, self.masks, self.layers = detector, masks, list(layers)
        self.strides, self.score_kinds = list(strides), list(score_kinds)
        self.settings = settings
        self.kept: Dict[int, float] = {}
        self.computed: Dict[int, float] = {}
        self._pruning = self._recording = False
        self._maps: Sequence[Tensor] = ()
        self._waiting: List[Tuple[Sequence[Tensor], Tensor]] = []

    def insert(self) -> None:
        """Become a part of the detector."""
        detector = self.detector
        detector.add_module(ATTRIBUTE, self.masks)
        detector.neck.register_forward_pre_hook(self._before_neck)
        detector.neck.register_forward_hook(self._after_neck)
        detector.bbox_head.head_module.register_forward_pre_hook(self._before_head)
        detector.bbox_head.head_module.register_forward_hook(self._after_head)
        detector.loss, detector.predict = self.loss, self.predict

    def loss(self, batch_inputs: Tensor, batch_data_samples: Any) -> Dict[str, Tensor]:
        """Compute the detector's losses and, as ``loss_spatial``, that of the masks."""
        boxes = batch_boxes(batch_data_samples)
        self._recording = True
        try:
            losses = type(self.detector).loss(self.detector, batch_inputs, batch_data_samples)
            logits = [self.masks.logits(stride, maps)
                      for stride, maps in zip(self.strides[1:], self._maps[1:])]
        finally:
            self._recording, self._maps = False, ()
        return dict(losses, loss_spatial=mask_loss(logits, boxes, self.strides, self.settings))

    def predict(self, batch_inputs: Tensor, batch_data_samples: OptSampleList,
                rescale: bool = True) -> SampleList:
        """Return the samples with the detections of the kept cells."""
        with self.pruning():
            return type(self.detector).predict(
                self.detector, batch_inputs, batch_data_samples, rescale=rescale)

    @contextmanager
    def pruning(self, on: bool = True) -> Iterator[None]:
        """Prune cells in all runs of the detector in eval mode in a block, or in none."""
        before, self._pruning = self._pruning, on and not self.detector.training
        try:
            yield
        finally:
            self._pruning = before
            self._stop_deferring()

    def _before_neck(self, neck: nn.Module, args: tuple) -> None:
        if self._pruning and self.layers[0].part is not None:
            self.layers[0].part.__dict__['forward'] = Deferred

    def _after_neck(self, neck: nn.Module, args: tuple, maps: Sequence[Tensor]) -> None:
        self._stop_deferring()
        if self._recording:
            self._maps = maps[:len(self.strides)]

    def _stop_deferring(self) -> None:
        if self.layers[0].part is not None:
            self.layers[0].part.__dict__.pop('forward', None)

    def _before_head(self, head_module: nn.Module, args: tuple) -> Optional[tuple]:
        """Find the kept cells, and replace the maps of pruned levels by single cells."""
        if not self._pruning:
            return None
        maps = list(args[0])
        self._waiting = self._find_kept(maps)
        for level, layers in enumerate(self.layers):
            maps[level] = maps[-1].new_zeros(1, layers.channels[level], 1, 1)
        return (tuple(maps), *args[1:])

    def _find_kept(self, maps: Sequence[Any]) -> List[Tuple[Sequence[Tensor], Tensor]]:
        """Return the inputs and the kept cells (N, 1, H, W) of each pruned level."""
        found, keep = [], None
        for level in reversed(range(len(self.layers))):
            stride, map_ = self.strides[level + 1], maps[level + 1]
            decided = kept_cells(self.masks.logits(stride, map_), self.settings.tau)
            inputs = (maps[level].inputs if isinstance(maps[level], Deferred)
                      else (maps[level], ))
            keep = below(decided if keep is None else decided & keep, inputs[-1].shape[-2:])
            found.insert(0, (inputs, keep))
        return found

    def _after_head(self, head_module: nn.Module, args: tuple,
                    outputs: Sequence[Sequence[Tensor]]) -> Optional[tuple]:
        """Put the predictions of the kept cells in their places."""
        if not self._pruning:
            return None
        outputs = [list(kind) for kind in outputs]
        for level, (inputs, keep) in enumerate(self._waiting):
            for kind, values in zip(outputs, self._predictions(level, inputs, keep)):
                if values is None:  # nothing is computed
                    values = kind[level].new_zeros(len(keep), kind[level].shape[1],
                                                   *keep.shape[-2:])
                kind[level] = values
            for kind, is_score in zip(outputs, self.score_kinds):
                kind[level] = kind[level].masked_fill(~keep, NO_SCORE if is_score else 0)
        self._waiting = []
        return tuple(outputs)

    def _predictions(self, level: int, inputs: Sequence[Tensor],
                     keep: Tensor) -> Sequence[Optional[Tensor]]:
        """Compute the predictions of each kind at kept cells at least; None if there are none."""
        layers, tile = self.layers[level], self.settings.tile
        places = active_places(keep, tile)
        rows, columns = (-(-side // tile) for side in keep.shape[-2:])
        share = len(places) / (len(keep) * rows * columns)
        self.kept[self.strides[level]] = float(keep.float().mean())
        self.computed[self.strides[level]] = share
        if not len(places):
            return [None] * len(self.score_kinds)
        if share > self.settings.dense_above:
            return layers(inputs)
        return layers.on_tiles(inputs, places)

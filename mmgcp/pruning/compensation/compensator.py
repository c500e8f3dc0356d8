# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.pruning.surgery import channels_off
from mmgcp.pruning.units import ChannelUnit

from .folding import Values, compensate
from .norms import adapt_norms
from .reconstruction import Compensated, reconstruct


@dataclass
class Compensator:
    """Compensates for channels that are about to be removed.

    The model changes in place. Channels are given as indices (K, ) by name of their unit, images
    in batches (N, C, H, W). The mode is False for nothing; 'fold-means' to fold the means of
    removed channels (folding.py); 'adapt-norms' to adapt the BatchNorms afterwards, too
    (norms.py); 'reconstruct' to fit layers to their original outputs (reconstruction.py); or
    True for the last with calibration images and the first without.

    The original is given if it has blocks that the model lacks; by default it is the model as it
    is. Only modes that read images make up for blocks.
    """
    model: nn.Module
    units: Sequence[ChannelUnit]
    mode: Union[bool, str]
    images: Optional[Iterable[Tensor]]
    shape: Sequence[int]
    original: Optional[nn.Module] = None

    def __post_init__(self):
        if self.mode is True:
            self.mode = 'fold-means' if self.images is None else 'reconstruct'

    def __call__(self, removed: Dict[str, Tensor]) -> Compensated:
        """Compensate for channels."""
        reference = self.reference() if removed or self.original is not None else None
        # Reconstruction does not depend on what was folded before
        incomplete = [] if self.fits_weights else self.fold(removed)
        done = self.adapt(removed, reference)
        return Compensated(incomplete + done.incomplete, done.fits)

    @property
    def reads_images(self) -> bool:
        """Whether the mode compares with the original on images."""
        return self.mode in ('adapt-norms', 'reconstruct')

    @property
    def fits_weights(self) -> bool:
        """Whether weights change in place, and not only biases and BatchNorms."""
        return self.mode == 'reconstruct'

    def fold(self, removed: Dict[str, Tensor], means: Optional[Values] = None) -> List[str]:
        """Fold the means of channels into their consumers, unless the mode is False.

        Means that are known already can be given. Returns the layers that could not absorb
        everything.
        """
        if not self.mode:
            return []
        return compensate(self.model, self.units, removed, self._checked(), self.shape, means)

    def reference(self) -> Optional[nn.Module]:
        """Return the original, or a copy of the model, for :meth:`adapt`; None if it needs none.

        A mode that needs images raises a PruningError if there are none.
        """
        if not self.reads_images:
            return None
        if self.images is None:
            raise PruningError(f'compensate={self.mode!r} needs calibration images, but there '
                               'are none (--calib-batches of tools/prune.py)')
        return copy.deepcopy(self.model) if self.original is None else self.original

    def adapt(self, removed: Dict[str, Tensor], reference: Optional[nn.Module]) -> Compensated:
        """Adapt the model without channels to a copy of the original, if there is one."""
        if reference is None:
            return Compensated()
        if self.fits_weights:
            return reconstruct(self.model, self.units, removed, self._checked(), self.shape,
                               reference)
        with channels_off(self.model, self.units, removed):
            adapt_norms(self.model, reference, self._checked())
        return Compensated()

    def _checked(self) -> Optional[Iterable[Tensor]]:
        return None if self.images is None else _FiniteImages(self.images)


@dataclass
class _FiniteImages:
    """Batches of images, of which those with values that are not finite are a PruningError."""
    images: Iterable[Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self.images):
            if not bool(batch.isfinite().all()):
                raise PruningError(f'batch {number} of the calibration images has pixels that are '
                                   'not finite')
            yield batch

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Makes up for channels that are about to be removed, in the layers that stay."""
import copy
from dataclasses import dataclass
from typing import Dict, Iterable, List, Optional, Sequence, Union

import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.pruning.masking import channels_off
from mmgcp.pruning.units import ChannelUnit

from .folding import Values, compensate
from .norms import adapt_norms


@dataclass
class Compensator:
    """Folds what removed channels emit, and adapts BatchNorms to what is left.

    Attributes:
        model (nn.Module): The model before surgery, which changes in place.
        units (Sequence[ChannelUnit]): Its channel units.
        mode (bool | str): False does nothing. ``'fold-means'`` folds the means of removed channels,
            see :mod:`mmgcp.pruning.compensation.folding`; ``'adapt-norms'`` then also adapts
            BatchNorms, see :mod:`mmgcp.pruning.compensation.norms`. True is the latter
            with calibration images, else the former.
        images (Iterable[Tensor], optional): Batches (N, C, H, W) of calibration images.
        shape (Sequence[int]): Shape (C, H, W) of an image that the model runs on.
    """
    model: nn.Module
    units: Sequence[ChannelUnit]
    mode: Union[bool, str]
    images: Optional[Iterable[Tensor]]
    shape: Sequence[int]

    def __call__(self, removed: Dict[str, Tensor]) -> List[str]:
        """Make up for channels.

        Args:
            removed (dict[str, Tensor]): Channels (K, ) to remove, by name of the unit.

        Returns:
            list[str]: See :meth:`fold`.
        """
        reference = self.reference() if removed else None
        uncompensated = self.fold(removed)
        self.adapt(removed, reference)
        return uncompensated

    def fold(self, removed: Dict[str, Tensor], means: Optional[Values] = None) -> List[str]:
        """Fold what channels emit into the layers that read them.

        Args:
            removed (dict[str, Tensor]): Channels (K, ) to remove, by name of the unit.
            means (dict, optional): What they emit on average, if that is known; see
                :func:`mmgcp.pruning.compensation.folding.compensate`.

        Returns:
            list[str]: The layers that could not absorb all of it.
        """
        if not self.mode:
            return []
        return compensate(self.model, self.units, removed, self.images, self.shape, means)

    def reference(self) -> Optional[nn.Module]:
        """Copy the model as it is, for :meth:`adapt`; None if it would do nothing.

        Raises:
            PruningError: The mode needs images, but there are none.
        """
        if self.mode in (False, 'fold-means') or self.mode is True and self.images is None:
            return None
        if self.images is None:
            raise PruningError("compensate='adapt-norms' needs calibration images, but there "
                               'are none (--calib-batches of tools/prune.py)')
        return copy.deepcopy(self.model)

    def adapt(self, removed: Dict[str, Tensor], reference: Optional[nn.Module]) -> None:
        """Adapt the BatchNorms of the model without channels to a copy of it as it was."""
        if reference is not None:
            with channels_off(self.model, self.units, removed):
                adapt_norms(self.model, reference, self.images)

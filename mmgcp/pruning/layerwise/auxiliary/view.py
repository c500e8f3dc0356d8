# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is computed once of each batch for a channel unit."""
from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor

from .attached import Outputs


@dataclass(frozen=True)
class View:
    """All of a batch that stays the same while the kernels of a unit's consumers are fitted.

    Attributes:
        expected (dict[str, list[Tensor]]): The consumers' outputs in the original model.
        inputs (dict[str, list[Tensor]], optional): The consumers' inputs. None if they depend
            on the kernels, because one consumer reads what another one computes.
        images (Tensor, optional): The images (N, C, H, W) in the latter case.
        targets (Any): The targets of the unit's auxiliary network; None without one.
    """
    expected: Outputs
    inputs: Optional[Outputs]
    images: Optional[Tensor]
    targets: Any

    @property
    def size(self) -> int:
        """The memory in bytes that the tensors take, without the targets."""
        tensors = [item for outputs in (self.expected, self.inputs or {})
                   for items in outputs.values() for item in items]
        if self.images is not None:
            tensors.append(self.images)
        return sum(item.nelement() * item.element_size() for item in tensors)

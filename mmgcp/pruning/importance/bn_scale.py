# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Dict

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.registry import TASK_UTILS

from ..structures import CoupledChannels


@TASK_UTILS.register_module()
class BNScale:
    """The absolute BatchNorm scale factors (`network slimming
    <https://arxiv.org/abs/1708.06519>`_).

    A criterion scores the channels of a coupled set, in each layer by itself; the
    planner compares a layer's scores with the threshold of the layer's group and
    merges the verdicts of the coupled layers.
    """

    def __call__(self, model: nn.Module, coupled: CoupledChannels) -> Dict[str, Tensor]:
        """Score the channels of a coupled set.

        Args:
            model (nn.Module): The model.
            coupled (CoupledChannels): The set, of size C.

        Returns:
            dict[str, Tensor]: The scores (C, ) of each normalisation layer in the set,
            NaN for channels that the layer does not have. Empty if no layer of the
            set is followed by a BatchNorm with scale factors.
        """
        scores = {}
        for item in coupled.side('out'):
            module = model.get_submodule(item.module)
            if isinstance(module, _BatchNorm) and module.affine:
                row = torch.full((coupled.size, ), float('nan'))
                row[item.roots] = module.weight.detach().abs().cpu().float()[item.channels]
                scores[item.module] = row
        return scores

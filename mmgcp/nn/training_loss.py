# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The training loss of a detector, for scores that depend on it."""
import copy
import random
from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Union

import numpy as np
import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from mmdet.models.layers import DropBlock
from mmdet.structures import DetDataSample
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmgcp.utils.process_state import hub_info, random_states_kept

from .temporarily import modes, values_kept

# An epoch in which detectors no longer use their assigner for untrained networks (YOLOv6)
LATE_EPOCH = 10**6
# Modules that stay in eval mode, so that running statistics do not change and nothing is random
QUIET_TYPES = (_BatchNorm, _DropoutNd, DropPath, DropBlock)


class Batch(NamedTuple):
    """A batch of training data, as a data preprocessor returns it.

    Attributes:
        images (Tensor): Preprocessed images (N, C, H, W).
        data_samples (list[DetDataSample] | dict): The ground truth.
    """
    images: Tensor
    data_samples: Union[List[DetDataSample], dict]


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the sum of a detector's losses; use it in :func:`loss_mode`.

    Args:
        model (nn.Module): The detector.
        batch (Batch): The data, which are not changed.

    Returns:
        Tensor: A differentiable scalar.
    """
    # YOLOv5's head normalises the boxes of the ground truth in place
    losses = model(batch.images, copy.deepcopy(batch.data_samples), mode='loss')
    return model.parse_losses(losses)[0]


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Let a detector compute losses with gradients, reproducibly and without lasting effects.

    All modules are in training mode, as heads require it, but normalisation uses its running
    statistics and nothing is dropped out. Random choices, such as the proposals that a
    two-stage detector learns from, are the same each time. Modes, buffers and the random states
    of the process are restored at the end.

    Args:
        model (nn.Module): The detector.
    """
    with hub_info('epoch', LATE_EPOCH), _same_seeds(model), torch.enable_grad(), \
            modes(model, lambda module: not isinstance(module, QUIET_TYPES)), \
            values_kept(model.buffers()):
        yield


@contextmanager
def _same_seeds(model: nn.Module) -> Iterator[None]:
    """Seed the random generators of the process and of the model's devices for a while."""
    devices = {param.device.index for param in model.parameters() if param.is_cuda}
    with random_states_kept(sorted(devices)):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield

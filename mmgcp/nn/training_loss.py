# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss of a detector on training data, for scores that depend on it."""
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

# Detectors that begin with an assigner for untrained networks (YOLOv6) are past that
LATE_EPOCH = 10**6
# Modules that stay in eval mode: the statistics of the data must not change, nor chance decide
QUIET_TYPES = (_BatchNorm, _DropoutNd, DropPath, DropBlock)


class Batch(NamedTuple):
    """A batch of training data as a detector gets it from its data preprocessor.

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
        batch (Batch): The data, which stay as they are.

    Returns:
        Tensor: A scalar with a gradient.
    """
    # YOLOv5's head normalises the boxes of the ground truth in place
    losses = model(batch.images, copy.deepcopy(batch.data_samples), mode='loss')
    return model.parse_losses(losses)[0]


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Let a detector compute losses with gradients, reproducibly and without traces in it.

    All modules are in training mode, as heads need it, but normalisation takes the running
    statistics and nothing is dropped out. What is drawn at random, such as the proposals
    that a two-stage detector learns from, is the same each time. Modes, buffers and the
    random states of the process are restored at the end.

    Args:
        model (nn.Module): The detector.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with hub_info('epoch', LATE_EPOCH), _same_chance(model), torch.enable_grad():
        for module in modes:
            module.training = not isinstance(module, QUIET_TYPES)
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def _same_chance(model: nn.Module) -> Iterator[None]:
    """Seed the random generators of the process and of the model's devices for a while."""
    devices = {param.device.index for param in model.parameters() if param.is_cuda}
    with random_states_kept(sorted(devices)):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        yield

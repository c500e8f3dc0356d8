# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The training loss of a detector, for scores that depend on it."""
import copy
from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Union

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from mmdet.models.layers import DropBlock
from mmdet.structures import DetDataSample
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmgcp.utils.process_state import alone, hub_info, random_states_kept, seed_random

from .temporarily import checkpointing_off, modes, values_kept

# An epoch in which detectors no longer use their assigner for untrained networks (YOLOv6)
LATE_EPOCH = 10**6
# Modules that stay in eval mode, so that running statistics do not change and nothing is random
QUIET_TYPES = (_BatchNorm, _DropoutNd, DropPath, DropBlock)


class Batch(NamedTuple):
    """Preprocessed images (N, C, H, W) and their ground truth, as a data preprocessor returns."""
    images: Tensor
    data_samples: Union[List[DetDataSample], dict]


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the differentiable sum of a detector's losses; use it in :func:`loss_mode`.

    The data are not changed. Other processes of a distributed run have no influence: in
    detectors' losses they have, and they would have to compute theirs at the same time.
    """
    with alone():
        # YOLOv5's head normalises the boxes of the ground truth in place
        losses = model(batch.images, copy.deepcopy(batch.data_samples), mode='loss')
        return model.parse_losses(losses)[0]


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Let a detector compute losses with gradients, reproducibly and without lasting effects.

    All modules are in training mode, as heads require it, but normalisation uses its running
    statistics and nothing is dropped out. Random choices, such as the proposals that a
    two-stage detector learns from, are the same each time; :func:`seed_batch` makes them depend
    on a batch alone. Modes, buffers and the random states of the process are restored at the end.
    """
    with hub_info('epoch', LATE_EPOCH), random_states_kept(cuda_devices(model)), \
            torch.enable_grad(), checkpointing_off(), values_kept(model.buffers()), \
            modes(model, lambda module: not isinstance(module, QUIET_TYPES)):
        seed_batch(model, 0)
        yield


def seed_batch(model: nn.Module, number: int) -> None:
    """Let random choices for a batch depend on its number; use it in :func:`loss_mode`."""
    seed_random(number, cuda_devices(model))


def cuda_devices(model: nn.Module) -> List[int]:
    """Return the numbers of the CUDA devices that a model is on."""
    return sorted({param.device.index for param in model.parameters() if param.is_cuda})

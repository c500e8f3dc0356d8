# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss of a detector on training data, for scores that depend on it."""
from contextlib import contextmanager
from typing import Iterator, List, NamedTuple, Union

import torch.nn as nn
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

# Detectors that begin with an assigner for untrained networks (YOLOv6) are past that
LATE_EPOCH = 10**6


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
        batch (Batch): The data.

    Returns:
        Tensor: A scalar with a gradient.
    """
    return model.parse_losses(model(*batch, mode='loss'))[0]


@contextmanager
def loss_mode(model: nn.Module) -> Iterator[None]:
    """Let a detector compute losses, deterministically and without changing its statistics.

    All modules are in training mode, as heads need it, but normalisation takes the running
    statistics and nothing is dropped out. Modes are restored at the end.

    Args:
        model (nn.Module): The detector.
    """
    modes = {module: module.training for module in model.modules()}
    hub = MessageHub.get_current_instance()
    epoch = hub.get_info('epoch')
    for module in modes:
        module.training = not isinstance(module, (_BatchNorm, _DropoutNd))
    hub.update_info('epoch', LATE_EPOCH)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        if epoch is None:
            hub.pop_info('epoch')
        else:
            hub.update_info('epoch', epoch)

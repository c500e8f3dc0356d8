# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Training auxiliary networks together with the detector that they are attached to."""
from typing import Any, Callable, Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.hooks import recording
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode
from mmgcp.pruning.scores.base import Progress

from .attached import Auxiliary, Outputs
from .optimisation import clipped_step, gradients_kept
from .settings import AuxiliarySettings

STAGE = 'auxiliary networks'


def train_jointly(model: nn.Module, auxiliaries: Mapping[str, Auxiliary],
                  find_targets: Callable[[nn.Module, Batch], Any], batches: Iterable[Batch],
                  progress: Progress, settings: AuxiliarySettings) -> None:
    """Train auxiliary networks, and the detector on its own loss and theirs.

    All networks are trained at the same time, each on its own loss. The detector is trained on
    its loss plus the mean of theirs. The gradients of each network and of the detector are
    clipped separately. Afterwards the networks are in eval mode and require no gradients.

    Args:
        model (nn.Module): The detector. Running statistics do not change.
        auxiliaries (Mapping[str, Auxiliary]): The networks and the outputs that they read.
        find_targets (Callable): Finds the targets of the networks, given detector and batch.
        batches (Iterable[Batch]): Training batches.
        progress (Callable): Called with a stage, the epochs done, and the number of epochs.
        settings (AuxiliarySettings): Epochs, learning rates and momentum.

    Raises:
        PruningError: A loss is not finite.
    """
    networks = [item.network.train().requires_grad_(True) for item in auxiliaries.values()]
    groups = [dict(params=list(network.parameters()), lr=settings.aux_lr) for network in networks]
    if settings.joint_lr:
        params = [param for param in model.parameters() if param.requires_grad]
        groups.append(dict(params=params, lr=settings.joint_lr))
    optimizer = torch.optim.SGD(groups, settings.aux_lr, settings.momentum) if groups else None
    progress(STAGE, 0, settings.aux_epochs)
    with loss_mode(model), gradients_kept(model.parameters()):
        for epoch in range(settings.aux_epochs if groups else 0):
            for batch in batches:
                with torch.no_grad():
                    targets = find_targets(model, batch)
                loss = _total_loss(model, auxiliaries, targets, batch, bool(settings.joint_lr))
                if not bool(loss.isfinite()):
                    raise PruningError('the loss of the detector and its auxiliary networks is '
                                       'not finite: try a lower aux_lr or joint_lr')
                if loss.requires_grad:  # networks alone learn nothing from images without objects
                    loss.backward()
                    clipped_step(optimizer)
            progress(STAGE, epoch + 1, settings.aux_epochs)
    for network in networks:
        network.eval().requires_grad_(False)


def _total_loss(model: nn.Module, auxiliaries: Mapping[str, Auxiliary], targets: Any,
                batch: Batch, joint: bool) -> Tensor:
    """Compute the sum of all losses, without that of the detector unless it is trained, too."""
    layers = {item.layer: None for item in auxiliaries.values()}
    with recording(model, layers) as outputs, torch.set_grad_enabled(joint):
        if joint:
            loss = detection_loss(model, batch)
        else:
            loss = batch.images.new_zeros(())
            run_as_tensors(model, batch.images)
    _scale_gradients(outputs, 1 / max(len(auxiliaries), 1))
    for item in auxiliaries.values():
        loss = loss + item.loss(outputs, targets)
    return loss


def _scale_gradients(outputs: Outputs, factor: float) -> None:
    """Scale what the detector gets of the gradients of its recorded outputs."""
    for output in (output for found in outputs.values() for output in found):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * factor)

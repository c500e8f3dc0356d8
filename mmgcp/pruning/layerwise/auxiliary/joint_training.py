# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Training auxiliary networks together with the detector they are attached to."""
from typing import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode
from mmgcp.pruning.scores.base import Progress

from .networks import Auxiliary
from .recording import Outputs, recording
from .sgd import SGD

STAGE = 'auxiliary networks'


def train_jointly(model: nn.Module, auxiliaries: Mapping[str, Auxiliary],
                  find_targets: Callable[[nn.Module, Batch], object], batches: Iterable[Batch],
                  progress: Progress, epochs: int, lr: float, joint_lr: float,
                  momentum: float) -> None:
    """Train auxiliary networks, and the detector on its own loss and theirs.

    All networks are trained at once. Each learns from its own loss; the detector learns from
    its loss and the mean of theirs. The gradients of each have a limited norm.
    In the end the networks are in eval mode and take no gradients.

    Args:
        model (nn.Module): The detector. Running statistics stay.
        auxiliaries (Mapping[str, Auxiliary]): The networks and where they sit.
        find_targets (Callable): Gives the targets of the networks for a batch.
        batches (Iterable[Batch]): Training batches.
        progress (Callable): Called with a stage, the steps done in it, and all its steps.
        epochs (int): Passes over the batches.
        lr (float): Learning rate of the networks.
        joint_lr (float): Learning rate of the detector; 0 to leave it alone.
        momentum (float): Momentum of SGD.

    Raises:
        PruningError: A loss is not finite.
    """
    networks = [item.network.train().requires_grad_(True) for item in auxiliaries.values()]
    owners = [(network, lr) for network in networks] + [(model, joint_lr)] * bool(joint_lr)
    groups = [SGD([param for param in owner.parameters() if param.requires_grad], rate, momentum)
              for owner, rate in owners]
    progress(STAGE, 0, epochs)
    with loss_mode(model):
        for epoch in range(epochs):
            for batch in batches:
                with torch.no_grad():
                    targets = find_targets(model, batch)
                loss = _loss(model, auxiliaries, targets, batch, bool(joint_lr))
                _step(loss, groups)
            progress(STAGE, epoch + 1, epochs)
    for network in networks:
        network.eval().requires_grad_(False)


def _loss(model: nn.Module, auxiliaries: Mapping[str, Auxiliary], targets, batch: Batch,
          joint: bool) -> Tensor:
    """The sum of all losses; gradients of the networks' reach the detector as a mean."""
    layers = {item.layer: None for item in auxiliaries.values()}
    with recording(model, layers) as outputs, torch.set_grad_enabled(joint):
        if joint:
            loss = detection_loss(model, batch)
        else:
            loss = batch.images.new_zeros(())
            run_as_tensors(model, batch.images)
    _share_gradients(outputs, 1 / max(len(auxiliaries), 1))
    for item in auxiliaries.values():
        loss = loss + item.loss(outputs, targets)
    return loss


def _share_gradients(outputs: Outputs, share: float) -> None:
    """Let only this share of the gradients of outputs go on to the detector."""
    for output in (output for found in outputs.values() for output in found):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * share)


def _step(loss: Tensor, groups: Sequence[SGD]) -> None:
    if not bool(loss.isfinite()):
        raise PruningError('the loss of the detector and its auxiliary networks is not finite: '
                           'try a lower aux_lr or joint_lr')
    params = [param for group in groups for param in group.params]
    if not loss.requires_grad:  # nothing to learn from
        return
    gradients = iter(torch.autograd.grad(loss, params, allow_unused=True))
    for group in groups:
        group.step([next(gradients) for _ in group.params])

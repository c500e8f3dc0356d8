# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Auxiliary networks that read outputs of a detector's layers, and their training with it."""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from mmgcp.errors import PruningError
from mmgcp.nn.calls import Calls, recording_calls
from mmgcp.nn.distributed import average_gradients, in_step, sum_over_ranks, total_over_ranks
from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.hooks import recording
from mmgcp.nn.temporarily import only_values_change
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode
from mmgcp.pruning.layerwise.consumers import find_consumers
from mmgcp.pruning.scores.base import Progress
from mmgcp.pruning.units import ChannelUnit

from .settings import AuxiliarySettings

LARGEST_NORM = 10.  # of gradients

# Name of a layer -> its outputs, call by call
Outputs = Dict[str, List[Tensor]]
# The targets of auxiliary networks, found with a detector that has all of its channels
FindTargets = Callable[[nn.Module, Batch], Any]


@dataclass
class Auxiliary:
    """An auxiliary network, which is no part of the model, and the output that it reads."""
    layer: str
    call: int  # which of the layer's calls in a forward pass, counted from 0
    channels: int  # of the output
    network: nn.Module

    def loss(self, outputs: Outputs, targets: Any) -> Tensor:
        """Compute the network's loss from the outputs of layers."""
        return self.network.loss(outputs[self.layer][self.call], targets)

    def state_dict(self) -> dict:
        """Return plain data from which :meth:`from_state` makes the same."""
        return dict(layer=self.layer, call=self.call, channels=self.channels,
                    weights=self.network.state_dict())

    @classmethod
    def from_state(cls, state: dict, make_network: Callable[[int], nn.Module]) -> 'Auxiliary':
        """Rebuild a trained network, given how to make one for a number of channels."""
        with torch.random.fork_rng(devices=[]):
            network = make_network(state['channels'])
        network.load_state_dict(state['weights'])
        return cls(state['layer'], state['call'], state['channels'],
                   network.eval().requires_grad_(False))


def watch_consumers(model: nn.Module, units: Sequence[ChannelUnit], images: Tensor) -> Calls:
    """Run a detector on images (N, C, H, W) and note the output shapes of units' consumers."""
    names = {name: None for unit in units for name in find_consumers(model, unit)}
    notes = dict.fromkeys(names, lambda _, output: output.shape)
    with loss_mode(model), torch.no_grad(), recording_calls(model, notes) as calls:
        run_as_tensors(model, images)
    return calls


def attach(model: nn.Module, units: Sequence[ChannelUnit], calls: Calls, num_images: int,
           make_network: Callable[[int], nn.Module]) -> Dict[str, Auxiliary]:
    """Make an auxiliary network for each unit, by its name, for its consumers' largest output.

    ``calls`` are those of :func:`watch_consumers` for so many images. Units whose consumers emit
    no feature maps of whole images with more than one cell have no network.
    """
    like, found = next(model.parameters()), {}
    for unit in units:
        calls_of_unit = [(name, number, call.note) for name in find_consumers(model, unit)
                         for number, call in enumerate(calls[name])]
        maps = [(name, number, shape) for name, number, shape in calls_of_unit
                if len(shape) == 4 and shape[0] == num_images and shape[2:].numel() > 1]
        if maps:
            name, number, shape = max(maps, key=lambda item: item[2].numel())
            found[unit.name] = Auxiliary(name, number, shape[1], make_network(shape[1]).to(like))
    return found


def train_jointly(model: nn.Module, auxiliaries: Mapping[str, Auxiliary],
                  find_targets: FindTargets, batches: Iterable[Batch], progress: Progress,
                  settings: AuxiliarySettings) -> None:
    """Train auxiliary networks, and the detector on its own loss plus the mean of theirs.

    All networks are trained at the same time, each on its own loss. The gradients of each network
    and of the detector are clipped separately. Running statistics of the detector do not change.
    Each step is for a batch of each rank that has one left; the networks normalise each of these
    by itself. Afterwards the networks are in eval mode and require no gradients. Raises a
    PruningError if a loss is not finite.
    """
    networks = [item.network.train().requires_grad_(True) for item in auxiliaries.values()]
    groups = [dict(params=list(network.parameters()), lr=settings.aux_lr) for network in networks]
    if settings.joint_lr:
        params = [param for param in model.parameters() if param.requires_grad]
        groups.append(dict(params=params, lr=settings.joint_lr))
    optimizer = torch.optim.SGD(groups, settings.aux_lr, settings.momentum) if groups else None
    progress('auxiliary networks', 0, settings.aux_epochs)
    with only_values_change(model), loss_mode(model):
        for epoch in range(settings.aux_epochs if groups else 0):
            for batch in in_step(batches):
                loss = torch.zeros(())
                if batch is not None:
                    with torch.no_grad():
                        targets = find_targets(model, batch)
                    loss = _total_loss(model, auxiliaries, targets, batch, bool(settings.joint_lr))
                if not bool(loss.isfinite()):
                    raise PruningError('the loss of the detector and its auxiliary networks is '
                                       'not finite: try a lower aux_lr or joint_lr')
                if loss.requires_grad:  # networks alone learn nothing from images without objects
                    loss.backward()
                average_gradients([param for group in groups for param in group['params']],
                                  active=batch is not None)
                clipped_step(optimizer)
            progress('auxiliary networks', epoch + 1, settings.aux_epochs)
    for network in networks:
        average_statistics(network.eval().requires_grad_(False))


def _total_loss(model: nn.Module, auxiliaries: Mapping[str, Auxiliary], targets: Any,
                batch: Batch, joint: bool) -> Tensor:
    """Compute the sum of all losses; that of the detector is in it if it is trained, too.

    What the detector gets of the other losses' gradients is divided by the number of networks.
    """
    layers = {item.layer: None for item in auxiliaries.values()}
    with recording(model, layers) as outputs, torch.set_grad_enabled(joint):
        if joint:
            loss = detection_loss(model, batch)
        else:
            loss = batch.images.new_zeros(())
            run_as_tensors(model, batch.images)
    for output in (output for found in outputs.values() for output in found):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * (1 / len(auxiliaries)))
    for item in auxiliaries.values():
        loss = loss + item.loss(outputs, targets)
    return loss


@torch.no_grad()
def average_statistics(network: nn.Module) -> None:
    """Let the statistics of BatchNorms, means over the batches of a rank, be those of all ranks."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            number = total_over_ranks(int(norm.num_batches_tracked))
            for mean in (norm.running_mean, norm.running_var) if number else ():
                mean.copy_(sum_over_ranks(mean * norm.num_batches_tracked / number))
            norm.num_batches_tracked.fill_(number)


def clipped_step(optimizer: Optimizer) -> None:
    """Clip the gradients of each group of parameters to a norm of 10, step and clear them."""
    for group in optimizer.param_groups:
        clip_grad_norm_(group['params'], LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Auxiliary networks that are attached to outputs of a detector's layers."""
from dataclasses import dataclass
from typing import Callable, Dict, List, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.calls import Call, Calls, recording_calls
from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.training_loss import loss_mode
from mmgcp.pruning.layerwise.consumers import find_consumers
from mmgcp.pruning.units import ChannelUnit

# Name of a layer -> its outputs, call by call
Outputs = Dict[str, List[Tensor]]


@dataclass
class Auxiliary:
    """An auxiliary network and the output that it reads. Nothing of it is put into the model.

    Attributes:
        layer (str): Name of the layer.
        call (int): Which of the layer's calls in a forward pass, counted from 0.
        channels (int): Number of channels of the output.
        network (nn.Module): The network.
    """
    layer: str
    call: int
    channels: int
    network: nn.Module

    def loss(self, outputs: Outputs, targets) -> Tensor:
        """Compute the network's loss from the outputs of layers."""
        return self.network.loss(outputs[self.layer][self.call], targets)

    def state_dict(self) -> dict:
        """Return plain data from which :meth:`from_state` makes the same."""
        return dict(layer=self.layer, call=self.call, channels=self.channels,
                    weights=self.network.state_dict())

    @classmethod
    def from_state(cls, state: dict, make_network: Callable[[int], nn.Module]) -> 'Auxiliary':
        """Make a trained network again.

        Args:
            state (dict): What :meth:`state_dict` returned.
            make_network (Callable): Makes a network for a number of channels.
        """
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
    """Make an auxiliary network for each unit, which reads its consumers' largest output.

    Args:
        model (nn.Module): The detector.
        units (Sequence[ChannelUnit]): The units.
        calls (Calls): What :func:`watch_consumers` returned for some images.
        num_images (int): Their number.
        make_network (Callable): Makes a network for a number of channels.

    Returns:
        dict[str, Auxiliary]: The networks by name of the unit. Units whose consumers emit no
        feature maps of whole images with more than one cell have none.
    """
    like, found = next(model.parameters()), {}
    for unit in units:
        outputs = [(name, number, call.note) for name in find_consumers(model, unit)
                   for number, call in enumerate(calls[name]) if _is_map(call, num_images)]
        if outputs:
            name, number, shape = max(outputs, key=lambda output: output[2].numel())
            found[unit.name] = Auxiliary(name, number, shape[1], make_network(shape[1]).to(like))
    return found


def _is_map(call: Call, num_images: int) -> bool:
    """Whether an output is a feature map of whole images with more than one cell."""
    shape = call.note
    return len(shape) == 4 and shape[0] == num_images and shape[2:].numel() > 1

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Offset compensation: what a removed channel carries is folded into its consumers.

A channel whose BatchNorm scale is zero emits the constant act(shift). Its share in the
output of each consumer, a convolution or linear layer, is a constant too, which the
consumer's BatchNorm mean or bias can absorb (GCP-SAD, `arXiv 2306.01526
<https://arxiv.org/abs/2306.01526>`_). Of a channel that is not constant, the mean can be
absorbed in the same way; calibration images tell it, as in `Data-Free Quantization
(arXiv 1906.04721) <https://arxiv.org/abs/1906.04721>`_.

A constant is absorbed exactly but for the zero padding at the border, where it is missing
in the original. The mean of a layer's outputs is kept exactly by convolutions with a 1x1
kernel and stride 1, linear layers, and transposed convolutions without padding whose
kernel is as large as their stride; otherwise up to the border.
"""
from contextlib import contextmanager
from typing import Dict, Iterable, Iterator, List, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.nn.forward import random_image
from mmgcp.nn.layers import find_layer, num_channels
from mmgcp.pruning.surgery import Channels, gather_channels
from mmgcp.pruning.units import ChannelUnit

from .statistics import Norms, measure_inputs

# Consumer -> its BatchNorms -> what its removed inputs (K, ) carry, NaN if that is unknown
Values = Dict[str, Dict[Norms, Tensor]]


@torch.no_grad()
def compensate(model: nn.Module, units: Iterable[ChannelUnit],
               removed: Dict[str, Tensor],
               images: Optional[Iterable[Tensor]] = None,
               input_shape: Sequence[int] = (3, 128, 128),
               means: Optional[Values] = None) -> List[str]:
    """Fold what channels that are about to be removed carry into their consumers.

    What they carry is seen at the consumers' inputs while the model runs, so that sums over
    shortcuts, pooling, upsampling, concatenation and depthwise convolutions need no rules
    of their own. With calibration images it is the mean of the channel over the images,
    all positions and all calls of the consumer that the same BatchNorm follows; if the
    channel is constant, that is the constant. Without them it is the constant of a channel
    that is constant as the model is, and otherwise the constant that the channel becomes
    when the BatchNorm scales of the removed channels are set to zero.

    Args:
        model (nn.Module): The model before surgery; means and biases change in place.
        units (Iterable[ChannelUnit]): Its channel units.
        removed (dict[str, Tensor]): Channels to remove, by name of the unit.
        images (Iterable[Tensor], optional): Batches (N, C, H, W) of calibration images, as
            :class:`mmgcp.datasets.calibration.ImagesOf` training batches yields them. They are
            gone through once. Defaults to None.
        input_shape (Sequence[int]): Shape (C, H, W) of the image of noise that the model
            runs on without calibration images.
        means (dict, optional): What the removed inputs (K, ) of each consumer carry on average
            over the images, by its BatchNorms, if that has been measured before (see
            :func:`mmgcp.pruning.compensation.statistics.measure_inputs`). Defaults to None.

    Returns:
        list[str]: Consumers that could not absorb everything: there is neither a BatchNorm
        of their own nor a bias; or, without calibration images, an input does not become
        constant, or the constant outputs of a transposed convolution repeat with its stride.
        What is known of their mean is absorbed in any case, if anything can absorb it.

    Raises:
        PruningError: There is no image in ``images``.
    """
    channels = gather_channels(units, removed)
    inputs = {name: indices for (name, side), indices in channels.items()
              if side == 'in' and len(indices)}
    if not inputs:
        return []
    if means is not None:
        values = means
    elif images is None:
        values = _constants(model, channels, inputs, input_shape)
    else:
        values = {name: {norms: item.mean for norms, item in entries.items()}
                  for name, entries in measure_inputs(model, inputs, images).items()}
    return [name for name, entries in values.items()
            if not fold_constants(model.get_submodule(name), inputs[name], entries,
                              images is None and means is None)]


def _constants(model: nn.Module, channels: Channels, inputs: Dict[str, Tensor],
               input_shape: Sequence[int]) -> Values:
    """The constants of removed inputs as the model is or else without their scales."""
    noise = [random_image(model, input_shape)]
    as_is = measure_inputs(model, inputs, noise)
    with _zeroed_scales(model, channels):
        zeroed = measure_inputs(model, inputs, noise)
    return {name: {norms: torch.where(item.constant.isnan(), zeroed[name][norms].constant,
                                      item.constant)
                   for norms, item in entries.items()}
            for name, entries in as_is.items()}


@contextmanager
def _zeroed_scales(model: nn.Module, channels: Channels) -> Iterator[None]:
    saved = {}
    for (name, side), indices in channels.items():
        layer = find_layer(model, name)
        if isinstance(layer, _BatchNorm) and layer.affine:
            saved[layer] = layer.weight.detach().clone()
            layer.weight.data[indices.to(layer.weight.device)] = 0
    try:
        yield
    finally:
        for layer, weight in saved.items():
            layer.weight.data.copy_(weight)


def fold_constants(layer: nn.Module, channels: Tensor, entries: Dict[Norms, Tensor],
                   exactly: bool) -> bool:
    """Let a consumer absorb what its inputs carry; False if something remains.

    Args:
        layer (nn.Module): The consumer.
        channels (Tensor): The removed channels (K, ) of its inputs.
        entries (dict): What they carry, by the BatchNorms to absorb it.
        exactly (bool): Whether more than the mean has to be absorbed.

    Returns:
        bool: Whether it could.
    """
    complete = True
    for norms, values in entries.items():
        inputs = values.new_zeros(num_channels(layer, 'in'))
        inputs[channels.to(values.device)] = values.nan_to_num(nan=0.)
        outputs = _outputs(layer, inputs)
        offset = outputs.mean(1)
        complete &= not bool(values.isnan().any())
        if exactly:
            complete &= bool(((outputs - offset[:, None]).abs() <= 1e-6).all())
        for norm in norms:
            if norm.running_mean is not None:  # otherwise it takes offsets away by itself
                norm.running_mean -= offset.to(norm.running_mean)
        if not norms and layer.bias is not None:
            layer.bias += offset.to(layer.bias)
        elif not norms:
            complete &= not bool(outputs.any())
    return complete


def _outputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What a layer without bias makes of constant inputs, far from the border.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer.
        inputs (Tensor): One value (C, ) for each input channel.

    Returns:
        Tensor: The values (O, P) of each output channel: one, or for a transposed
        convolution one for each phase of its stride.
    """
    weight = layer.weight.detach().to(inputs)
    if isinstance(layer, nn.Linear):
        return (weight @ inputs)[:, None]
    inputs = inputs.view(layer.groups, -1)
    if not isinstance(layer, nn.ConvTranspose2d):
        kernels = weight.flatten(2).sum(2).unflatten(0, (layer.groups, -1))
        return torch.einsum('goi,gi->go', kernels, inputs).reshape(-1, 1)
    kernels = weight.unflatten(0, (layer.groups, -1))
    taps = torch.einsum('giohw,gi->gohw', kernels, inputs).flatten(0, 1)
    phases = taps.new_zeros(len(taps), *layer.stride)
    for y in range(taps.shape[1]):
        for x in range(taps.shape[2]):
            place = (y * layer.dilation[0] % layer.stride[0],
                     x * layer.dilation[1] % layer.stride[1])
            phases[:, place[0], place[1]] += taps[:, y, x]
    return phases.flatten(1)

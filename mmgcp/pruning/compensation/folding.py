# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Folding what removed channels emit into their consumers.

A channel whose BatchNorm scale is zero emits the constant act(shift). What it adds to the output
of each consumer, a convolution or linear layer, is constant as well, so the mean of the
consumer's BatchNorm or its bias can absorb it (GCP-SAD, `arXiv 2306.01526
<https://arxiv.org/abs/2306.01526>`_). If a channel is not constant, its mean can be absorbed in
the same way; calibration images tell the mean, as in `Data-Free Quantization (arXiv 1906.04721)
<https://arxiv.org/abs/1906.04721>`_.

A constant is absorbed exactly, except at the border if there is zero padding, where the original
does not add it. The mean of a layer's output is preserved exactly by convolutions with a 1x1
kernel and stride 1, by linear layers, and by transposed convolutions without padding whose
kernel is as large as their stride; by others except at the border.
"""
from typing import Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.nn.forward import random_image
from mmgcp.nn.layers import find_layer, num_channels, spread_inputs, weight_by_output
from mmgcp.nn.temporarily import values_kept
from mmgcp.pruning.surgery import Channels, gather_channels
from mmgcp.pruning.units import ChannelUnit

from .statistics import Norms, measure_inputs

# Consumer -> its BatchNorms -> values (K, ) of its removed inputs, NaN if unknown
Values = Dict[str, Dict[Norms, Tensor]]


@torch.no_grad()
def compensate(model: nn.Module, units: Iterable[ChannelUnit],
               removed: Dict[str, Tensor],
               images: Optional[Iterable[Tensor]] = None,
               input_shape: Sequence[int] = (3, 128, 128),
               means: Optional[Values] = None) -> List[str]:
    """Fold what channels emit that are about to be removed into their consumers.

    The values are observed at the inputs of the consumers while the model runs, so that
    shortcuts, pooling, upsampling, concatenation and depthwise convolutions need no rules. With
    calibration images (batches (N, C, H, W), iterated over once), the value of a channel is its
    mean over all images, spatial positions and those runs of the consumer that the same
    BatchNorm follows. Without, it is the constant that the channel emits on noise of the input
    shape (C, H, W), or, if it is not constant, the constant that it emits once the BatchNorm
    scales of all removed channels are set to zero. Means that are known already can be given.

    Running means and biases change in place. Returns the consumers that could not absorb
    everything: they have neither a BatchNorm of their own nor a bias; or, without calibration
    images, an input does not become constant, or the constant output of a transposed
    convolution varies with its stride. If anything can absorb them, the known means are
    absorbed in any case. Raises a PruningError if ``images`` has no image.
    """
    channels = gather_channels(units, removed)
    inputs = {name: indices for (name, side), indices in channels.items()
              if side == 'in' and len(indices)}
    if not inputs:
        return []
    values = means
    if means is None and images is None:
        values = _constants(model, channels, inputs, input_shape)
    elif means is None:
        values = {name: {norms: item.mean for norms, item in entries.items()}
                  for name, entries in measure_inputs(model, inputs, images).items()}
    return [name for name, entries in values.items()
            if not fold_constants(model.get_submodule(name), inputs[name], entries,
                                  images is None and means is None)]


def _constants(model: nn.Module, channels: Channels, inputs: Dict[str, Tensor],
               input_shape: Sequence[int]) -> Values:
    """Find the constants of removed inputs, of the model as it is or else without scales."""
    noise = [random_image(model, input_shape)]
    layers = [(find_layer(model, name), indices) for (name, _), indices in channels.items()]
    scales = [(layer.weight, indices) for layer, indices in layers
              if isinstance(layer, _BatchNorm) and layer.affine]
    as_is = measure_inputs(model, inputs, noise)
    with values_kept(scale for scale, _ in scales):
        for scale, indices in scales:
            scale[indices.to(scale.device)] = 0
        zeroed = measure_inputs(model, inputs, noise)
    return {name: {norms: torch.where(item.constant.isnan(), zeroed[name][norms].constant,
                                      item.constant)
                   for norms, item in entries.items()}
            for name, entries in as_is.items()}


@torch.no_grad()
def fold_constants(layer: nn.Module, channels: Tensor, entries: Dict[Norms, Tensor],
                   exactly: bool) -> bool:
    """Let a consumer absorb constant inputs.

    By the BatchNorms that are to absorb them (the bias of the layer if there are none),
    ``entries`` has the values (K, ) of its inputs ``channels``, NaN if unknown. ``exactly`` says
    whether absorbing the mean of the output over space is not enough. Returns whether everything
    could be absorbed.
    """
    complete = True
    for norms, values in entries.items():
        inputs = values.new_zeros(num_channels(layer, 'in'))
        inputs[channels.to(values.device)] = values.nan_to_num(nan=0.)
        outputs = constant_outputs(layer, inputs)
        offset = outputs.mean(1)
        complete &= not bool(values.isnan().any())
        if exactly:
            complete &= bool(((outputs - offset[:, None]).abs() <= 1e-6).all())
        for norm in norms:
            if norm.running_mean is not None:  # otherwise it subtracts the mean of its inputs
                norm.running_mean -= offset.to(norm.running_mean)
        if not norms and layer.bias is not None:
            layer.bias += offset.to(layer.bias)
        elif not norms:
            complete &= not bool(outputs.any())
    return complete


def constant_outputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Compute the output (O, P) of a layer for constant inputs (I, ), without its bias.

    Far from the border there are P values for each channel: one, or for a transposed convolution
    one for each phase of its stride.
    """
    weighted = layer.weight.detach().to(inputs) * spread_inputs(layer, inputs)
    taps = weight_by_output(layer, weighted).sum(1)
    if not isinstance(layer, nn.ConvTranspose2d):
        return taps.view(len(taps), -1).sum(1, keepdim=True)
    for dim, stride in enumerate(layer.stride):  # sum the taps that reach the same phase
        phases = torch.arange(layer.kernel_size[dim], device=taps.device)
        phases = phases * layer.dilation[dim] % stride
        shape = [*taps.shape[:dim + 1], stride, *taps.shape[dim + 2:]]
        taps = taps.new_zeros(shape).index_add(dim + 1, phases, taps)
    return taps.flatten(1)

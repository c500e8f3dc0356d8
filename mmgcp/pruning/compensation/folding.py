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
from mmgcp.nn.layers import find_layer, num_channels, weight_by_output
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
    calibration images, the value of a channel is its mean over all images, spatial positions
    and those runs of the consumer that the same BatchNorm follows. Without, it is the constant
    that the channel emits, or, if it is not constant, the constant that it emits once the
    BatchNorm scales of all removed channels are set to zero.

    Args:
        model (nn.Module): The model before surgery. Its running means and biases are changed in
            place.
        units (Iterable[ChannelUnit]): Its channel units.
        removed (dict[str, Tensor]): Indices of the channels to remove, by name of the unit.
        images (Iterable[Tensor], optional): Batches (N, C, H, W) of calibration images, iterated
            over once, such as :class:`mmgcp.datasets.calibration.ImagesOf`. Defaults to None.
        input_shape (Sequence[int]): Shape (C, H, W) of the image of noise that the model
            runs on without calibration images. Defaults to (3, 128, 128).
        means (dict, optional): The means of the removed inputs (K, ) of each consumer by its
            BatchNorms, if they have been measured already (see
            :func:`mmgcp.pruning.compensation.statistics.measure_inputs`). Defaults to None.

    Returns:
        list[str]: Consumers that could not absorb everything: they have neither a BatchNorm
        of their own nor a bias; or, without calibration images, an input does not become
        constant, or the constant output of a transposed convolution varies with its stride.
        If anything can absorb them, the known means are absorbed in any case.

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

    Args:
        layer (nn.Module): The consumer.
        channels (Tensor): Indices (K, ) of its inputs.
        entries (dict): Their values (K, ), NaN if unknown, by the BatchNorms that are to absorb
            them; the bias of the layer if there are none.
        exactly (bool): Whether absorbing the mean of the output over space is not enough.

    Returns:
        bool: Whether everything could be absorbed.
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
            if norm.running_mean is not None:  # otherwise it subtracts the mean of its inputs
                norm.running_mean -= offset.to(norm.running_mean)
        if not norms and layer.bias is not None:
            layer.bias += offset.to(layer.bias)
        elif not norms:
            complete &= not bool(outputs.any())
    return complete


def _outputs(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Compute the output of a layer for constant inputs, without bias and far from the border.

    Args:
        layer (nn.Module): A convolution, transposed convolution or linear layer.
        inputs (Tensor): A value for each input channel (I, ).

    Returns:
        Tensor: Values (O, P) of each output channel: one, or for a transposed convolution one
        for each phase of its stride.
    """
    weight = weight_by_output(layer).detach().to(inputs)
    groups = getattr(layer, 'groups', 1)
    by_tap = weight.reshape(groups, -1, *weight.shape[1:2], weight[0, 0].numel())
    taps = torch.einsum('goit,gi->got', by_tap, inputs.view(groups, -1)).flatten(0, 1)
    if not isinstance(layer, nn.ConvTranspose2d):
        return taps.sum(1, keepdim=True)
    taps = taps.view(-1, *layer.kernel_size)
    for dim, stride in enumerate(layer.stride):  # sum the taps that reach the same phase
        phases = torch.arange(layer.kernel_size[dim], device=taps.device)
        phases = phases * layer.dilation[dim] % stride
        shape = [*taps.shape[:dim + 1], stride, *taps.shape[dim + 2:]]
        taps = taps.new_zeros(shape).index_add(dim + 1, phases, taps)
    return taps.flatten(1)

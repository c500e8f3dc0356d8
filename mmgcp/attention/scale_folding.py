# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Folding factors of the outputs of blocks into the layers that read them."""
from collections import defaultdict
from typing import Dict, Iterable, List, Optional, Sequence, Set

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.nn.forward import random_image, run_as_tensors
from mmgcp.nn.hooks import hooked
from mmgcp.nn.layers import NORM_TYPES, WEIGHT_TYPES, is_depthwise, num_channels, spread_inputs
from mmgcp.pruning.tracing import traceable
from mmgcp.pruning.units import ChannelUnit


def fold_scales(model: nn.Module, units: Iterable[ChannelUnit],
                producers: Dict[str, str], products: Dict[str, Tensor],
                energies: Dict[str, Tensor], input_shape: Sequence[int] = (3, 128, 128)) -> None:
    """Fold factors of the outputs of blocks into the layers that read them.

    If a channel of a block has the values x without and y with its factor, the factor is
    E[xy] / E[x^2], with which x comes closest to y. Sums, concatenations, pooling and upsampling
    may be between a block and a layer that reads it. Where the outputs of several blocks are
    added, all get the factor sum(E[xy]) / sum(E[x^2]); other summands are ignored. Convolutions,
    linear layers and BatchNorms can take up the factors.

    Args:
        model (nn.Module): The model without the factors. Its parameters are replaced, not
            changed in place.
        units (Iterable[ChannelUnit]): Its channel units.
        producers (dict[str, str]): For each block the name of the layer that produces the
            channels of its output.
        products (dict[str, Tensor]): For each block the sums (C, ) of xy over images and
            positions; blocks without an entry have no factors.
        energies (dict[str, Tensor]): The sums (C, ) of x^2 in the same way.
        input_shape (Sequence[int]): Shape (C, H, W) in pixels of an image to trace the model
            with. Defaults to (3, 128, 128).
    """
    modules = dict(model.named_modules())
    read = find_read_blocks(model, producers, input_shape)
    factors: Dict[str, Tensor] = {}
    for unit in units:
        outputs = {item.module: item for item in unit.side('out')}
        for item in unit.slices:
            layer = modules.get(item.module)
            if item.side != _input_side(layer) or not read.get(item.module):
                continue
            numerators, denominators = torch.zeros(2, unit.size, dtype=torch.double)
            for block in read[item.module]:
                output = outputs.get(producers[block])
                if output is not None and block in products:
                    numerators.index_add_(0, output.unit_index, products[block][output.channels])
                    denominators.index_add_(0, output.unit_index, energies[block][output.channels])
            quotients = torch.where(denominators > 0, numerators / denominators,
                                    torch.ones_like(numerators))
            values = factors.setdefault(
                item.module, torch.ones(num_channels(layer, item.side), dtype=torch.double))
            values[item.channels] = quotients[item.unit_index]
    for name, values in factors.items():
        _scale_inputs(modules[name], values)


def find_read_blocks(model: nn.Module, blocks: Iterable[str],
                     input_shape: Sequence[int]) -> Dict[str, Set[str]]:
    """Find the blocks whose outputs each layer reads, with no other layer in between.

    Args:
        model (nn.Module): The model.
        blocks (Iterable[str]): Names of modules that return feature maps.
        input_shape (Sequence[int]): Shape (C, H, W) in pixels of an image to trace the model
            with.

    Returns:
        dict[str, set[str]]: Names of the blocks by name of the convolution, linear layer or
        normalisation.
    """
    blocks = set(blocks)
    # Nodes of the autograd graph that layers and blocks return; None for layers
    ends: Dict[object, Optional[str]] = {}
    inputs: Dict[str, List[object]] = defaultdict(list)
    handles = []

    def record_output(name):
        def hook(module, args, output):
            ends[output.grad_fn] = name if name in blocks else None
        return hook

    def record_input(name):
        return lambda module, args: inputs[name].append(args[0].grad_fn)

    for name, module in model.named_modules():
        is_layer = isinstance(module, (*WEIGHT_TYPES, *NORM_TYPES))
        if is_layer:
            handles.append(module.register_forward_pre_hook(record_input(name)))
        if is_layer or name in blocks:
            handles.append(module.register_forward_hook(record_output(name)))
    with hooked(handles), traceable(model), torch.enable_grad():
        run_as_tensors(model, random_image(model, input_shape))
    return {name: _nearest_blocks(nodes, ends) for name, nodes in inputs.items()}


def _nearest_blocks(nodes: Iterable[object], ends: Dict[object, Optional[str]]) -> Set[str]:
    """The blocks that are reached first when going back from nodes of the autograd graph."""
    found, seen, pending = set(), set(), list(nodes)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.add(ends[node])
        else:
            pending.extend(source for source, _ in node.next_functions)
    return found - {None}


def _input_side(layer: Optional[nn.Module]) -> Optional[str]:
    """The side that stands for a layer's inputs in a channel unit."""
    if isinstance(layer, _BatchNorm) or is_depthwise(layer):
        return 'out'
    return 'in' if isinstance(layer, WEIGHT_TYPES) else None


def _scale_inputs(layer: nn.Module, factors: Tensor) -> None:
    """Make a layer compute what it computes of inputs multiplied by factors (C, )."""
    if isinstance(layer, _BatchNorm):
        _scale_norm_inputs(layer, factors)
        return
    weight = layer.weight.detach()
    scaled = weight * spread_inputs(layer, factors.to(weight))
    layer.weight = nn.Parameter(scaled, requires_grad=layer.weight.requires_grad)


def _scale_norm_inputs(norm: _BatchNorm, factors: Tensor) -> None:
    """The same for a BatchNorm, unless it has no weights or no running statistics."""
    if not norm.affine or norm.running_mean is None:
        return
    weight, bias = norm.weight.detach(), norm.bias.detach()
    factors = factors.to(weight)
    shift = weight * norm.running_mean * (norm.running_var + norm.eps).rsqrt()
    norm.bias = nn.Parameter(bias - (1 - factors) * shift, requires_grad=norm.bias.requires_grad)
    norm.weight = nn.Parameter(weight * factors, requires_grad=norm.weight.requires_grad)

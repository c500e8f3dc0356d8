# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Folding factors on the outputs of blocks into the layers that read them."""
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
                producers: Dict[str, str], scaled: Dict[str, Tensor], energies: Dict[str, Tensor],
                input_shape: Sequence[int] = (3, 128, 128)) -> None:
    """Multiply factors on the outputs of blocks into the layers that read them.

    The factor of a block's channel with the values x and the scaled values y is
    E[xy] / E[x^2], which comes nearest to y. Between a block and a layer that reads it
    there may be sums, concatenations, pooling and upsampling. Where the outputs of several
    blocks are added up, all of them get E[sum of xy] / E[sum of x^2]; other summands are left
    out of account. Layers that read are convolutions, linear layers and BatchNorms.

    Args:
        model (nn.Module): The model without the factors. Its parameters are replaced, not
            changed in place.
        units (Iterable[ChannelUnit]): Its channel units.
        producers (dict[str, str]): Name of the layer whose channels a block returns, by name
            of the block.
        scaled (dict[str, Tensor]): Sums (C, ) of xy over images and places, by block; blocks
            that are missing have no factors.
        energies (dict[str, Tensor]): Sums (C, ) of x^2.
        input_shape (Sequence[int]): Shape (C, H, W) of an image to trace the model with.
    """
    modules = dict(model.named_modules())
    sources = find_sources(model, producers, input_shape)
    factors: Dict[str, Tensor] = {}
    for unit in units:
        outputs = {item.module: item for item in unit.side('out')}
        for item in unit.slices:
            layer = modules.get(item.module)
            if item.side != _reading_side(layer) or not sources.get(item.module):
                continue
            above, below = torch.zeros(2, unit.size, dtype=torch.double)
            for block in sources[item.module]:
                source = outputs.get(producers[block])
                if source is not None and block in scaled:
                    above.index_add_(0, source.unit_index, scaled[block][source.channels])
                    below.index_add_(0, source.unit_index, energies[block][source.channels])
            quotients = torch.where(below > 0, above / below, torch.ones_like(above))
            values = factors.setdefault(
                item.module, torch.ones(num_channels(layer, item.side), dtype=torch.double))
            values[item.channels] = quotients[item.unit_index]
    for name, values in factors.items():
        _scale_inputs(modules[name], values)


def find_sources(model: nn.Module, blocks: Iterable[str],
                 input_shape: Sequence[int]) -> Dict[str, Set[str]]:
    """Find the blocks that layers read without another layer between them.

    Args:
        model (nn.Module): The model.
        blocks (Iterable[str]): Names of modules that return feature maps.
        input_shape (Sequence[int]): Shape (C, H, W) of an image to trace the model with.

    Returns:
        dict[str, set[str]]: Blocks by name of the layer: a convolution, linear layer or
        normalisation.
    """
    blocks = set(blocks)
    ends: Dict[object, Optional[str]] = {}  # node of the autograd graph -> block that ends there
    reads: Dict[str, List[object]] = defaultdict(list)
    handles = []

    def mark(name):
        def hook(module, args, output):
            ends[output.grad_fn] = name if name in blocks else None
        return hook

    def read(name):
        return lambda module, args: reads[name].append(args[0].grad_fn)

    for name, module in model.named_modules():
        is_layer = isinstance(module, (*WEIGHT_TYPES, *NORM_TYPES))
        if is_layer:
            handles.append(module.register_forward_pre_hook(read(name)))
        if is_layer or name in blocks:
            handles.append(module.register_forward_hook(mark(name)))
    with hooked(handles), traceable(model), torch.enable_grad():
        run_as_tensors(model, random_image(model, input_shape))
    return {name: _blocks_before(nodes, ends) for name, nodes in reads.items()}


def _blocks_before(nodes: List[object], ends: Dict[object, Optional[str]]) -> Set[str]:
    """The blocks among the nearest ends before some nodes of the autograd graph."""
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


def _reading_side(layer: Optional[nn.Module]) -> Optional[str]:
    """The side by which a channel unit names what a layer reads."""
    if isinstance(layer, _BatchNorm) or is_depthwise(layer):
        return 'out'
    return 'in' if isinstance(layer, WEIGHT_TYPES) else None


def _scale_inputs(layer: nn.Module, factors: Tensor) -> None:
    """Let a layer do what it does with inputs that are multiplied by factors (C, )."""
    if isinstance(layer, _BatchNorm):
        _scale_norm_inputs(layer, factors)
        return
    weight = layer.weight.detach()
    scaled = weight * spread_inputs(layer, factors.to(weight))
    layer.weight = nn.Parameter(scaled, requires_grad=layer.weight.requires_grad)


def _scale_norm_inputs(norm: _BatchNorm, factors: Tensor) -> None:
    """The same for a normalisation with running statistics."""
    if not norm.affine or norm.running_mean is None:
        return
    weight, bias = norm.weight.detach(), norm.bias.detach()
    factors = factors.to(weight)
    shift = weight * norm.running_mean * (norm.running_var + norm.eps).rsqrt()
    norm.bias = nn.Parameter(bias - (1 - factors) * shift, requires_grad=norm.bias.requires_grad)
    norm.weight = nn.Parameter(weight * factors, requires_grad=norm.weight.requires_grad)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Where attention is put: the modules that return the prunable channels of a detector."""
from collections import defaultdict
from typing import Dict, List, Sequence, Union

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmyolo.models.layers import RepVGGBlock

from mmgcp.errors import PruningError
from mmgcp.nn.calls import following_norms
from mmgcp.nn.forward import IMAGE_SHAPE, head_left_out_on_demand, record_shapes
from mmgcp.nn.layers import CONV_TYPES, NORM_TYPES, find_layer, is_depthwise, num_channels
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.pruning.prunable import find_prunable_or_leave_head_out
from mmgcp.pruning.units import ChannelUnit, LayerGroup

PRUNABLE = 'prunable'
# A convolution with everything that follows it; the attention comes behind the whole
BLOCK_TYPES = (ConvModule, RepVGGBlock)


def find_blocks(model: nn.Module, modules: Union[str, Sequence[str]] = PRUNABLE,
                input_shape: Sequence[int] = IMAGE_SHAPE) -> Dict[str, str]:
    """Find the modules that return the prunable channels of a detector without attention.

    ``modules`` has patterns of layers, or is 'prunable' for all; ``input_shape`` is the shape
    (C, H, W) of an image. Returns, by name of the block, the name of the convolution that
    produces the channels; one that several blocks share appears several times. Raises a
    PruningError if the model cannot be traced, a pattern matches nothing, or there is no such
    module.
    """
    with head_left_out_on_demand(model):
        units, _, shape = find_prunable_or_leave_head_out(model, input_shape)
        return _find_blocks(model, modules, units, shape)


def _find_blocks(model: nn.Module, modules: Union[str, Sequence[str]],
                 units: Sequence[ChannelUnit], shape: Sequence[int]) -> Dict[str, str]:
    """Find the modules that return the channels of units, as :func:`find_blocks` does."""
    convs = _prunable_convs(model, modules, units)
    around = _blocks_around(model)
    producers = {block: name for name, conv in convs.items() for block in around[conv]}
    bare = [name for name, conv in convs.items() if not around[conv]]
    for name, norms in following_norms(model, bare, shape, NORM_TYPES).items():
        producers.update(dict.fromkeys(norms or [name], name))
    shapes = {block: emitted for block, _, emitted in record_shapes(model, producers, shape)}
    found = {block: name for block, name in producers.items()
             if _is_map(shapes.get(block, ()), num_channels(convs[name], 'out'))}
    if not found:
        raise PruningError(f'there is no prunable convolution for attention in {modules}')
    return found


def _prunable_convs(model: nn.Module, modules: Union[str, Sequence[str]],
                    units: Sequence[ChannelUnit]) -> Dict[str, nn.Module]:
    """Return the convolutions that pruning could remove channels from, not the depthwise ones."""
    names = dict.fromkeys(item.module for unit in units for item in unit.side('out'))
    layers = {name: find_layer(model, name) for name in names}
    convs = {name: layer for name, layer in layers.items()
             if isinstance(layer, CONV_TYPES) and not is_depthwise(layer)}
    if modules == PRUNABLE:
        return convs
    patterns = [modules] if isinstance(modules, str) else modules
    chosen = assign_groups(model, convs, [LayerGroup('attention', tuple(patterns))])
    return {name: convs[name] for name in chosen}


def _blocks_around(model: nn.Module) -> Dict[nn.Module, List[str]]:
    """Return the outermost blocks that contain each module, each block by its first name."""
    found: Dict[nn.Module, List[str]] = defaultdict(list)
    names: Dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f'{block}.') for block in names.values())
        if isinstance(module, BLOCK_TYPES) and module not in names and not inside:
            names[module] = name
            for inner in module.modules():
                found[inner].append(name)
    return found


def _is_map(shape: Sequence[int], channels: int) -> bool:
    """Whether a shape is that of a feature map with these channels and several positions."""
    return len(shape) == 4 and shape[1] == channels and shape[2] * shape[3] > 1

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Where attention is put: the modules that return the prunable channels of a detector."""
from collections import defaultdict
from typing import Dict, Iterable, List, Sequence, Tuple, Union

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmyolo.models.layers import RepVGGBlock
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.forward import IMAGE_SHAPE, run_with_hooks, working_shape
from mmgcp.nn.layers import CONV_TYPES, NORM_TYPES, find_layer, is_depthwise, num_channels
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.pruning.units import LayerGroup

PRUNABLE = 'prunable'
# A convolution with everything that follows it; the attention comes behind the whole
BLOCK_TYPES = (ConvModule, RepVGGBlock)


def find_blocks(model: nn.Module, modules: Union[str, Sequence[str]] = PRUNABLE,
                input_shape: Sequence[int] = IMAGE_SHAPE) -> Dict[str, str]:
    """Find the modules that return the prunable channels of a detector.

    Args:
        model (nn.Module): The detector, without attention.
        modules (str | Sequence[str]): Patterns of layers, or 'prunable' for all.
        input_shape (Sequence[int]): Shape (C, H, W) of an image in pixels.

    Returns:
        dict[str, str]: By name of the block, the name of the convolution that produces the
        channels. A convolution that several blocks share appears several times.

    Raises:
        PruningError: The model cannot be traced, a pattern matches nothing, or there is no such
            module.
    """
    shape = working_shape(model, input_shape)
    convs = _prunable_convs(model, modules, shape)
    around = _blocks_around(model)
    producers = {block: name for name, conv in convs.items() for block in around[conv]}
    bare = [name for name, conv in convs.items() if not around[conv]]
    shapes, norms = _run(model, shape, producers, bare)
    producers.update(norms)
    producers.update((name, name) for name in bare if name not in norms.values())
    found = {block: name for block, name in producers.items()
             if _is_map(shapes.get(block, ()), num_channels(convs[name], 'out'))}
    if not found:
        raise PruningError(f'there is no prunable convolution for attention in {modules}')
    return found


def _prunable_convs(model: nn.Module, modules: Union[str, Sequence[str]],
                    shape: Sequence[int]) -> Dict[str, nn.Module]:
    """The convolutions, apart from depthwise ones, that pruning could remove channels from."""
    units, _ = find_units(model, shape)
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
    """The outermost blocks that contain each module, each block by its first name."""
    found: Dict[nn.Module, List[str]] = defaultdict(list)
    names: Dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f'{block}.') for block in names.values())
        if isinstance(module, BLOCK_TYPES) and module not in names and not inside:
            names[module] = name
            for inner in module.modules():
                found[inner].append(name)
    return found


def _run(model: nn.Module, shape: Sequence[int], blocks: Iterable[str],
         bare: Sequence[str]) -> Tuple[Dict[str, Sequence[int]], Dict[str, str]]:
    """Run a model once on an image of a shape (C, H, W).

    Args:
        model (nn.Module): The model.
        shape (Sequence[int]): Shape (C, H, W) of the image.
        blocks (Iterable[str]): Names of the blocks.
        bare (Sequence[str]): Names of the convolutions that are in no block.

    Returns:
        tuple: The shapes of the outputs of all blocks, bare convolutions and normalisations
        that ran, and the bare convolution that each normalisation reads, if it reads one.
    """
    shapes: Dict[str, Sequence[int]] = {}
    outputs: List[Tuple[Tensor, str]] = []
    norms: Dict[str, str] = {}

    def record_output(name):
        def hook(_, args, output):
            shapes[name] = output.shape if isinstance(output, Tensor) else ()
            if name in bare:
                outputs.append((output, name))
        return hook

    def record_input(norm):
        def hook(_, args):
            norms.update((norm, name) for output, name in outputs if args[0] is output)
        return hook

    handles = []
    for name, module in model.named_modules():
        is_norm = isinstance(module, NORM_TYPES)
        if is_norm:
            handles.append(module.register_forward_pre_hook(record_input(name)))
        if is_norm or name in blocks or name in bare:
            handles.append(module.register_forward_hook(record_output(name)))
    run_with_hooks(model, shape, handles)
    return shapes, norms


def _is_map(shape: Sequence[int], channels: int) -> bool:
    """Whether a shape is that of a feature map with these channels and several positions."""
    return len(shape) == 4 and shape[1] == channels and shape[2] * shape[3] > 1

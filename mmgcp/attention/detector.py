# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from collections import defaultdict
from typing import Dict, List, Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmyolo.models.layers import RepVGGBlock

from mmgcp.errors import PruningError
from mmgcp.nn.forward import IMAGE_SHAPE, run_with_hooks, working_shape
from mmgcp.nn.layers import CONV_TYPES, NORM_TYPES, find_layer, is_depthwise, num_channels
from mmgcp.pruning.graph import find_units
from mmgcp.pruning.layer_groups import assign_groups
from mmgcp.pruning.units import LayerGroup
from mmgcp.registry import MODELS

from .modules import InsertedAttention

PRUNABLE = 'prunable'
SETTINGS = {'modules', 'num_groups', 'initial_scale', 'input_shape'}
# A convolution with what belongs to it; the attention is behind the whole
BLOCK_TYPES = (ConvModule, RepVGGBlock)


@MODELS.register_module()
def SCADetector(detector_type: str, attention: dict = {}, **kwargs) -> nn.Module:  # noqa: N802
    """Build a detector with spatial and channel attention, to train it for pruning by
    :class:`mmgcp.pruning.scores.CPSCA` (`arXiv 2011.03891 <https://arxiv.org/abs/2011.03891>`_).

    .. code-block:: python

        _base_ = 'any_detector.py'
        custom_imports = dict(imports=['mmgcp'], allow_failed_imports=False)
        model = dict(type='mmgcp.SCADetector', detector_type=_base_.model.type)
        prune_cfg = dict(criterion=dict(type='mmgcp.CPSCA'), target_params=0.5)

    Behind each convolution whose channels pruning could remove, after its normalisation and
    activation, there is a :class:`mmgcp.models.layers.SCAModule`, in training as in testing.
    It is a function that the registry calls like a class: what it returns is of the detector's
    own class, with all modules under their own names, and ``sca`` beside them, which
    optimizers, averages and checkpoints take for a part of it. A checkpoint of the plain
    detector can be loaded to start from; ``tools/prune.py`` gives the plain detector back.

    In blocks other than ConvModule and RepVGGBlock it is behind the normalisation that reads
    the convolution, before the activation. Depthwise convolutions, and layers that emit 1x1
    maps as squeeze-excitation does, have none.

    Args:
        detector_type (str): Type of the detector, as ``'YOLODetector'``; also
            ``'mmgcp.PrunedDetector'``.
        attention (dict): May have ``modules``, patterns of the layers to put attention behind
            as in a layer group, or 'prunable' for all (the default); ``num_groups`` and
            ``initial_scale`` of :class:`mmgcp.models.layers.SCAModule`; and ``input_shape``, the
            shape (C, H, W) of an image to look at the structure with.
            Defaults to an empty one.
        **kwargs: The arguments of the detector.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: A setting is wrong, the model cannot be traced (without Torch-Pruning,
            too), or nothing can be pruned.
        ValueError: ``num_groups`` or ``initial_scale`` is out of its range.
    """
    settings = dict(attention)
    if not set(settings) <= SETTINGS:
        raise PruningError(f'attention may have {sorted(SETTINGS)}, but has {sorted(settings)}')
    model = MODELS.build(dict(type=detector_type, **kwargs))
    modules = settings.pop('modules', PRUNABLE)
    shape = settings.pop('input_shape', IMAGE_SHAPE)
    with torch.random.fork_rng(devices=[]):  # looking at it changes nothing that is drawn
        producers = find_blocks(model, modules, shape)
    channels = {block: num_channels(find_layer(model, layer), 'out')
                for block, layer in producers.items()}
    InsertedAttention(producers, channels, **settings).insert(model)
    return model


def plain_model_config(model: dict) -> dict:
    """Return the config of the detector without attention; that of any other as it is.

    Args:
        model (dict): The ``model`` of a config.

    Returns:
        dict: A new one if anything is different.
    """
    if model['type'].split('.')[-1] != 'SCADetector':
        return model
    plain = {key: value for key, value in model.items()
             if key not in ('detector_type', 'attention')}
    return dict(plain, type=model['detector_type'])


def find_blocks(model: nn.Module, modules: Union[str, Sequence[str]] = PRUNABLE,
                input_shape: Sequence[int] = IMAGE_SHAPE) -> Dict[str, str]:
    """Find the modules that return the prunable channels of a detector.

    Args:
        model (nn.Module): The detector, without attention.
        modules (str | Sequence[str]): Patterns of layers, or 'prunable' for all.
        input_shape (Sequence[int]): Shape (C, H, W) of an image.

    Returns:
        dict[str, str]: Name of the convolution by name of the module. A convolution that
        several modules share has several.

    Raises:
        PruningError: The model cannot be traced, a pattern matches nothing, or there is none.
    """
    shape = working_shape(model, input_shape)
    units, _ = find_units(model, shape)
    names = dict.fromkeys(item.module for unit in units for item in unit.side('out'))
    layers = {name: find_layer(model, name) for name in names}
    layers = {name: layer for name, layer in layers.items()
              if isinstance(layer, CONV_TYPES) and not is_depthwise(layer)}
    if modules != PRUNABLE:
        modules = [modules] if isinstance(modules, str) else modules
        owners = assign_groups(model, layers, [LayerGroup('attention', tuple(modules))])
        layers = {name: layers[name] for name in owners}
    around = _blocks_by_layer(model)
    producers = {block: name for name, layer in layers.items() for block in around[layer]}
    bare = {name: layer for name, layer in layers.items() if not around[layer]}
    shapes = _run(model, shape, producers, bare)
    found = {block: name for block, name in producers.items()
             if block in shapes and _is_map(shapes[block], layers[name])}
    if not found:
        raise PruningError(f'there is no prunable convolution for attention in {modules}')
    return found


def _blocks_by_layer(model: nn.Module) -> Dict[nn.Module, List[str]]:
    """Names of the outermost blocks around each module, each block once."""
    found: Dict[nn.Module, List[str]] = defaultdict(list)
    names: Dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f'{block}.') for block in names.values())
        if isinstance(module, BLOCK_TYPES) and module not in names and not inside:
            names[module] = name
            for inner in module.modules():
                found[inner].append(name)
    return found


def _run(model: nn.Module, shape: Sequence[int], producers: Dict[str, str],
         bare: Dict[str, nn.Module]) -> Dict[str, torch.Size]:
    """Run a model once, and find blocks for the convolutions that are in none.

    Args:
        model (nn.Module): The model.
        shape (Sequence[int]): Shape (C, H, W) of the image.
        producers (dict[str, str]): Name of the convolution by block; gets those of the others.
        bare (dict[str, nn.Module]): These others.

    Returns:
        dict: Shapes of what the modules returned that are blocks, if they ran.
    """
    shapes: Dict[str, torch.Size] = {}
    outputs: List[Tuple[torch.Tensor, str]] = []
    norms: Dict[str, str] = {}

    def look_at(name):
        def hook(_, args, output):
            shapes[name] = output.shape if isinstance(output, torch.Tensor) else torch.Size()
            if name in bare:
                outputs.append((output, name))
        return hook

    def read_by(norm):
        def hook(_, args):
            norms.update((norm, name) for output, name in outputs if args[0] is output)
        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, NORM_TYPES):
            handles.append(module.register_forward_pre_hook(read_by(name)))
        if isinstance(module, NORM_TYPES) or name in producers or name in bare:
            handles.append(module.register_forward_hook(look_at(name)))
    run_with_hooks(model, shape, handles)
    producers.update(norms)
    producers.update((name, name) for name in bare if name not in norms.values())
    return shapes


def _is_map(shape: torch.Size, layer: nn.Module) -> bool:
    """Whether something is a map of more than one place with the channels of a layer."""
    return (len(shape) == 4 and shape[1] == num_channels(layer, 'out')
            and shape[2] * shape[3] > 1)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Where features may cross from the student's head into the teacher's."""
from typing import Dict, List, Sequence, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import UserError, shown
from mmgcp.nn.forward import (
    flatten_tensors,
    random_image,
    run_as_tensors,
    run_on_noise,
    working_shape,
)
from mmgcp.nn.hooks import recording
from mmgcp.nn.lookup import find_module
from mmgcp.nn.temporarily import eval_mode, requiring_grad

from .groups import as_pair
from .part_outputs import runnable_copy
from .responses import HEAD

Pairs = List[Tuple[str, str]]


def read_layers(layers: Sequence[Union[str, Tuple[str, str]]]) -> Pairs:
    """Read names of layers of the heads, or pairs of names in student and teacher."""
    pairs = []
    if isinstance(layers, (list, tuple)):
        pairs = [as_pair(layer) for layer in layers if isinstance(layer, (str, list, tuple))]
        pairs = pairs if len(pairs) == len(layers) else []
    if not pairs or not all(name.startswith(f'{HEAD}.') for pair in pairs for name in pair):
        raise UserError(f'layers must be a list of names of layers below {HEAD!r}, but is '
                        f'{shown(layers)}')
    return pairs


def find_cross_layers(student: nn.Module, teacher: nn.Module) -> Pairs:
    """Find the convolutions that emit the predictions, which must have the same names."""
    names = [find_prediction_layers(model) for model in (student, teacher)]
    if names[0] != names[1] or not names[0]:
        raise UserError('name the layers of mmgcp.CrossHeadLoss: the predictions are emitted by '
                        f'{names[0]} in the student and by {names[1]} in the teacher')
    return list(zip(*names))


def find_prediction_layers(model: nn.Module) -> List[str]:
    """Find the convolutions of a detector's head that emit its predictions.

    These are the last convolutions on the way to what the head returns, whatever it computes from
    what they emit.
    """
    model = runnable_copy(model)
    owners = {layer.weight: name for name, layer in model.named_modules()
              if isinstance(layer, nn.Conv2d) and name.startswith(f'{HEAD}.')}
    with torch.enable_grad(), eval_mode(model), requiring_grad(model, model.parameters()):
        outputs = run_as_tensors(model, random_image(model, working_shape(model)))
    pending = [tensor.grad_fn for tensor in flatten_tensors(outputs)]
    seen, found = set(), set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        sources = [source for source, _ in node.next_functions]
        layers = {owners.get(getattr(source, 'variable', None)) for source in sources} - {None}
        found |= layers
        if not layers:
            pending += sources
    return [name for name in owners.values() if name in found]


def count_input_channels(layers: Pairs, student: nn.Module,
                         teacher: nn.Module) -> List[Tuple[int, int]]:
    """Count the channels of what layers read in student and teacher.

    A UserError says if a model lacks a layer, or what a layer reads does not correspond.
    """
    shape = max(working_shape(runnable_copy(model)) for model in (student, teacher))
    shapes = [_input_shapes(model, [pair[side] for pair in layers], shape, owner)
              for side, (model, owner) in enumerate([(student, 'student'), (teacher, 'teacher')])]
    channels = []
    for pair in layers:
        mine, theirs = (found[name] for found, name in zip(shapes, pair))
        sizes = [[tuple(shape[-2:]) for shape in side] for side in (mine, theirs)]
        if sizes[0] != sizes[1]:
            raise UserError(f'the layer {pair[0]!r} of the student reads maps of the sizes '
                            f'{sizes[0]}, but the layer {pair[1]!r} of the teacher {sizes[1]}')
        channels.append((mine[0][1], theirs[0][1]))
    return channels


def _input_shapes(model: nn.Module, names: Sequence[str], shape: Sequence[int],
                  owner: str) -> Dict[str, List[torch.Size]]:
    """Return the shapes of what layers read, call by call, for noise of a shape (C, H, W)."""
    for name in names:
        find_module(model, name, owner)
    model = runnable_copy(model)
    with recording(model, names, inputs=True, copy=False) as inputs:
        run_on_noise(model, shape)
    for name, found in inputs.items():
        if not found or not all(isinstance(item, Tensor) and item.dim() == 4 for item in found):
            raise UserError(f'the layer {name!r} of the {owner} must read feature maps '
                            '(N, C, H, W) whenever the detector runs')
    return {name: [item.shape for item in found] for name, found in inputs.items()}

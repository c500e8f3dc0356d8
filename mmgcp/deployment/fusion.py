# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A copy of a detector in which fewer layers compute the same: what runs on a device."""
import copy
from collections import Counter
from typing import Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm

from mmgcp.errors import UserError
from mmgcp.nn.calls import Calls, recording_calls
from mmgcp.nn.forward import flatten_tensors, run_on_noise, working_shape
from mmgcp.nn.layers import weight_by_output

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
TOLERANCE = 1e-3  # of what folding may change, far above rounding and far below a wrong fold


def fused(model: nn.Module, shape: Optional[Sequence[int]] = None) -> nn.Module:
    """Copy a detector with RepVGG blocks as single convolutions and BatchNorms folded.

    MMCV's ``fuse_conv_bn`` goes by the order in which modules are registered, and folds the
    BatchNorms of all levels into a convolution that the levels share, as in RTMDet's head. Here
    each level gets its own copy first, and it counts what runs: see :func:`fold_norms`.

    Args:
        model (nn.Module): The detector, which is not changed.
        shape (Sequence[int], optional): Shape (C, H, W) of an image in pixels that it runs on.
            Defaults to None: a small one.

    Returns:
        nn.Module: The copy, in eval mode.

    Raises:
        UserError: The copy computes something else.
    """
    copied = copy.deepcopy(model).eval()
    dtype = next(copied.parameters()).dtype
    for block in list(copied.modules()):
        if hasattr(block, 'switch_to_deploy'):  # RepVGG and its kind
            block.double().switch_to_deploy()
            block.to(dtype)
    _unshare(copied)
    fold_norms(copied, shape)
    return copied


def _unshare(model: nn.Module) -> None:
    """Replace modules that have several names by copies, so that each has one."""
    seen = set()
    for owner in list(model.modules()):
        for name, child in owner._modules.items():
            if child in seen:
                setattr(owner, name, copy.deepcopy(child))
            elif child is not None:
                seen.add(child)


@torch.no_grad()
def fold_norms(model: nn.Module, shape: Optional[Sequence[int]] = None) -> List[str]:
    """Fold BatchNorms into the convolutions before them, in place, for eval mode.

    A BatchNorm is folded if it reads the outputs of one convolution only, and all of them, in all
    the calls of a run. A detector that then computes something else, because an output is also read
    by something that is no BatchNorm, is an error.

    Args:
        model (nn.Module): The detector.
        shape (Sequence[int], optional): See :func:`fused`.

    Returns:
        list[str]: The names of the BatchNorms, in whose places there are identities now.

    Raises:
        UserError: The detector computes something else now.
    """
    shape = working_shape(model) if shape is None else shape
    layers = dict(model.named_modules())
    convs = [name for name, layer in layers.items() if isinstance(layer, CONVS)]
    with recording_calls(model, {name: lambda *_: None for name in convs}) as calls:
        before = flatten_tensors(run_on_noise(model, shape))
    before = [tensor.clone() for tensor in before]
    pairs = {norm: conv for norm, conv in _only_pairs(calls).items()
             if layers[norm].running_var is not None}
    for norm, conv in pairs.items():
        _fold(layers[conv], layers[norm])
    replaced = {layers[norm] for norm in pairs}
    for owner in layers.values():
        for name, child in list(owner.named_children()):
            if child in replaced:
                setattr(owner, name, nn.Identity())
    for old, new in zip(before, flatten_tensors(run_on_noise(model, shape))):
        if not ((old - new).abs() <= TOLERANCE * old.abs().clamp(min=1)).all():
            raise UserError('the BatchNorms of this detector cannot be folded into its '
                            'convolutions: something else reads what a convolution emits')
    return list(pairs)


def _only_pairs(calls: Calls) -> Dict[str, str]:
    """The convolution of each BatchNorm that reads all its outputs and nothing else."""
    reads = Counter(norm for found in calls.values() for call in found for norm in call.norms)
    pairs = {}
    for conv, found in calls.items():
        norms = {tuple(call.norms) for call in found}
        if len(norms) == 1 and len(min(norms)) == 1:
            (norm, ) = min(norms)
            if reads[norm] == len(found) and norm not in calls.foreign:
                pairs[norm] = conv
    return pairs


def _fold(conv: nn.Module, norm: _BatchNorm) -> None:
    """Let a convolution compute what it computes with a BatchNorm behind it."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double()
    if conv.bias is not None:
        shift = shift + conv.bias.double()
    shift = shift * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias
    weight = conv.weight.double()
    view = weight_by_output(conv, weight)
    view = view * scale.view(-1, *[1] * (view.dim() - 1))
    if isinstance(conv, nn.ConvTranspose2d):
        view = _swapped_back(conv, view)
    conv.weight = nn.Parameter(view.to(conv.weight).contiguous(), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(conv.weight), requires_grad=False)


def _swapped_back(conv: nn.ConvTranspose2d, view: torch.Tensor) -> torch.Tensor:
    """From (O, I / G, ...) to the (I, O / G, ...) of a transposed convolution in G groups."""
    return view.unflatten(0, (conv.groups, -1)).transpose(1, 2).flatten(0, 1)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""How far what a pruned model computes is from what the original computes."""
from typing import Any, Callable, Dict, Hashable, Iterable, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.distillation import SoftLabelLoss
from mmgcp.distillation.responses import Responses, can_be_read, read_responses
from mmgcp.errors import PruningError
from mmgcp.nn.distributed import sum_by_name
from mmgcp.nn.forward import flatten_tensors, is_head_left_out, run_as_tensors
from mmgcp.nn.hooks import recording
from mmgcp.nn.layers import WEIGHT_TYPES, num_channels
from mmgcp.nn.sampling import as_maps
from mmgcp.pruning.surgery import Channels, stays_of

# Channels of the original that vary less count as if they varied by this share of the mean
LEAST_VARIANCE = 0.01
# What is compared by its place: (name of the layer or '', number of the call or the tensor)
Maps = Dict[Tuple[str, int], Tensor]


def make_imitation(student: nn.Module, teacher: nn.Module, removed: Channels,
                   images: Iterable[Tensor]) -> Callable[[Tensor], Tensor]:
    """Make a function that says how far a pruned model is from the original on images.

    Detectors whose heads can be read are compared by their predictions, in the way of
    :class:`SoftLabels`, all others layer by layer, in that of :class:`Imitation`, whose
    arguments it takes.
    """
    if all(can_be_read(model) and not is_head_left_out(model) for model in (student, teacher)):
        return SoftLabels(student, teacher)
    return Imitation(student, teacher, removed, images)


class SoftLabels:
    """The loss of a pruned detector with the predictions of the original as its labels.

    It is the sum of the parts of :class:`mmgcp.distillation.SoftLabelLoss`.

    Args:
        student (nn.Module): The pruned detector. Gradients flow through it.
        teacher (nn.Module): The original.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self._student, self._teacher = student, teacher
        self._loss = SoftLabelLoss()

    def __call__(self, images: Tensor) -> Tensor:
        """Return the loss for images (N, C, H, W)."""
        with torch.no_grad():
            labels = self._predict(self._teacher, images)
        return sum(self._loss(self._predict(self._student, images), labels).values())

    def _predict(self, model: nn.Module, images: Tensor) -> Responses:
        return read_responses(model.bbox_head, run_as_tensors(model, images))


class Imitation:
    """The difference between what a pruned model and the original compute on the same images.

    Compared are the raw predictions and what each convolution and linear layer reads, in the
    channels that are left, which correspond one to one. The squared difference of a channel is
    divided by the variance that it has in the original, so that 1 is as bad as emitting its
    mean. This is averaged over channels and places, then over layers and calls, and over
    predictions; the sum of these two is the difference.

    Args:
        student (nn.Module): The pruned model. Gradients flow through it.
        teacher (nn.Module): The original.
        removed (Channels): Channels (K, ) that the original's layers have lost.
        images (Iterable[Tensor]): Batches (N, C, H, W) to measure the variances on.

    Raises:
        PruningError: The models or the channels do not fit.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, removed: Channels,
                 images: Iterable[Tensor]):
        self._student, self._teacher = student, teacher
        present = dict(student.named_modules())  # without those of removed blocks
        self._kept = {name: kept for name, kept in _kept_inputs(teacher, removed).items()
                      if name in present}
        for name, kept in self._kept.items():
            if num_channels(student.get_submodule(name), 'in') != len(kept):
                raise PruningError(f'the layer {name} of the pruned model does not read the '
                                   'channels that the original has left there')
        self._scales = {key: scale.to(next(student.parameters()))
                        for key, scale in self._measure(images).items()}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the difference for images (N, C, H, W)."""
        with torch.no_grad():
            expected = self._run(self._teacher, images, self._kept)
        found = self._run(self._student, images, {})
        if {key: value.shape for key, value in found.items()} != {
                key: value.shape for key, value in expected.items()}:
            raise PruningError('the pruned model does not predict what the original predicts, or '
                               'runs its layers in another way')
        parts: Dict[bool, list] = {True: [], False: []}
        for key, value in found.items():
            difference = (value - expected[key]).square() * self._scales[key]
            parts[key[0] == ''].append(difference.mean())
        return sum(torch.stack(part).mean() for part in parts.values() if part)

    def _run(self, model: nn.Module, images: Tensor, kept: Dict[str, Tensor]) -> Maps:
        """Run a model; return maps (N, H, W, C) of what is compared."""
        with recording(model, self._kept, inputs=True) as read:
            outputs = run_as_tensors(model, images)
        maps = {('', number): _channels_last(tensor)
                for number, tensor in enumerate(flatten_tensors(outputs))}
        for name, calls in read.items():
            for number, values in enumerate(calls):
                values = as_maps(model.get_submodule(name), values)
                maps[name, number] = values[..., kept[name]] if name in kept else values
        return maps

    @torch.no_grad()
    def _measure(self, images: Iterable[Tensor]) -> Dict[Tuple[str, int], Tensor]:
        """Return one over the variance of each channel in the original."""
        sums: Dict[Hashable, Any] = {}
        for batch in images:
            for key, values in self._run(self._teacher, batch, self._kept).items():
                values = values.flatten(0, -2).double()
                moments = torch.stack((torch.full_like(values[0], len(values)), values.sum(0),
                                       values.square().sum(0))).cpu()
                sums[key] = sums[key] + moments if key in sums else moments
        scales = {}
        for key, (number, total, squares) in sum_by_name(sums).items():
            variances = (squares / number - (total / number).square()).clamp(min=0)
            least = LEAST_VARIANCE * variances.mean()
            scales[key] = 1 / variances.clamp(min=float(least) or 1.)
        return scales


def _kept_inputs(model: nn.Module, removed: Channels) -> Dict[str, Tensor]:
    """Return the input channels that layers have left: nothing if it is not known which."""
    kept = {}
    for name, layer in model.named_modules() if removed else ():
        if isinstance(layer, WEIGHT_TYPES):
            kept[name] = stays_of(layer, name, 'in', removed).nonzero().flatten()
    return kept


def _channels_last(tensor: Tensor) -> Tensor:
    """View predictions (N, C, H, W) or (..., C) with channels in the last dimension."""
    return tensor.movedim(1, -1) if tensor.dim() == 4 else tensor

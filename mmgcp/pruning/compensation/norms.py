# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Least squares compensation: BatchNorms estimate their original outputs from their new inputs.

Without some channels, the inputs of a BatchNorm have another mean and a smaller variance, and
are not just shifted and scaled. If only the means were corrected, variances would shrink from
layer to layer, as in a network between two others (variance collapse, `REPAIR (arXiv 2211.08403)
<https://arxiv.org/abs/2211.08403>`_). So the running statistics of each BatchNorm become those
of its new inputs, as in `EagleEye (arXiv 2007.02491) <https://arxiv.org/abs/2007.02491>`_, and
its scale is multiplied by the correlation of new and original inputs. Its outputs are then the
least squares estimates of the original ones from the new inputs, channel by channel. Where
nothing has changed, the correlation is 1 and the BatchNorm stays as it was. The eps of the
BatchNorm is added to all variances, so that inputs that have nearly vanished are not blown up.
"""
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, NamedTuple, Union

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.nn.distributed import numbered, sum_by_name
from mmgcp.nn.forward import run_as_tensors
from mmgcp.nn.hooks import on_inputs
from mmgcp.nn.precision import at_least_single
from mmgcp.nn.temporarily import eval_mode, values_kept

# Number of values of a channel in a batch, at random positions, to estimate correlations from
NUM_SAMPLES = 1024
TINY = 1e-12


@torch.no_grad()
def adapt_norms(model: nn.Module, reference: nn.Module, images: Iterable[Tensor]) -> None:
    """Adapt the BatchNorms of a model with channels off to those of a copy of the original.

    Both models run side by side on batches (N, C, H, W), of which each rank has its own. In the
    changed one, each BatchNorm is adapted in place to the batch before it computes, so that later
    ones see the inputs that they will have in the end. Afterwards the statistics of all batches of
    all ranks determine its running statistics, scale and shift. BatchNorms without running
    statistics, or that run several times for an image, are left alone; without a scale only the
    running statistics change.
    """
    originals = _find_norms(reference)
    pairs = {name: _Pair(norm, originals[name]) for name, norm in _find_norms(model).items()}
    norms = [pair.norm for pair in pairs.values()]
    tensors = [tensor for norm in norms
               for tensor in (norm.running_mean, norm.running_var, *norm.parameters())]
    like = next(model.parameters())
    with on_inputs(reference, {name: pair.see_original for name, pair in pairs.items()}), \
            on_inputs(model, {name: pair.adapt_to_batch for name, pair in pairs.items()}), \
            eval_mode(reference), eval_mode(model):
        for number, batch in numbered(images):
            for pair in pairs.values():
                pair.originals, pair.seed = [], number
            batch = batch.to(like)
            run_as_tensors(reference, batch)
            with values_kept(tensors):
                run_as_tensors(model, batch)
    found = {name: pair for name, pair in pairs.items() if pair.count}
    totals = sum_by_name({name: pair.total.cpu() for name, pair in found.items()})
    counts = sum_by_name({name: pair.count for name, pair in found.items()})
    for name, total in totals.items():
        pairs[name].adapt((total / counts[name]).to(like.device))


def _find_norms(model: nn.Module) -> Dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None}


class _Inputs(NamedTuple):
    """What is remembered of the inputs of a BatchNorm for a batch, in double precision."""
    mean: Tensor  # (C, )
    var: Tensor  # (C, )
    deviations: Tensor  # of values (S, C) at random positions from their mean
    count: int  # number of values of a channel


def _summarise(inputs: Tensor, seed: int) -> _Inputs:
    """Summarise inputs (N, C, ...), with samples at the same positions for the same seed."""
    values = at_least_single(inputs.movedim(1, -1))
    var, mean = torch.var_mean(values, list(range(values.dim() - 1)), unbiased=False)
    count = values[..., 0].numel()
    generator = torch.Generator().manual_seed(seed)
    if count <= NUM_SAMPLES:
        samples = values.flatten(0, -2).double()
    else:
        samples = values[tuple(torch.randint(size, (NUM_SAMPLES, ), generator=generator)
                               for size in values.shape[:-1])].double()
    return _Inputs(mean.double(), var.double(), samples - samples.mean(0), count)


@dataclass
class _Pair:
    """A BatchNorm in both models."""
    norm: _BatchNorm  # that of the changed model
    original: _BatchNorm
    originals: List[_Inputs] = field(default_factory=list)  # of the original in this batch
    seed: int = 0  # of the positions of the samples in this batch
    total: Union[Tensor, float] = 0.  # sum of the moments (7, C) of all values
    count: int = 0  # number of values of a channel in all batches

    def see_original(self, inputs: Tensor) -> None:
        """Remember inputs of the original BatchNorm."""
        self.originals.append(_summarise(inputs, self.seed))

    def adapt_to_batch(self, inputs: Tensor) -> None:
        """Adapt the BatchNorm to its inputs and add their moments to the total."""
        if len(self.originals) != 1:
            return
        old, new = self.originals[0], _summarise(inputs, self.seed)
        x, y = old.deviations, new.deviations
        moments = torch.stack((old.mean, new.mean, old.var, new.var, x.square().mean(0),
                               y.square().mean(0), (x * y).mean(0)))
        self.count += old.count
        self.total = self.total + moments * old.count
        self.adapt(moments)

    def adapt(self, moments: Tensor) -> None:
        """Adapt the BatchNorm to moments (7, C) of both inputs and of the samples of both."""
        norm, eps = self.norm, self.norm.eps
        old_mean, new_mean, old_var, new_var, old_sample_var, new_sample_var, cov = moments
        mean, var = self.original.running_mean.double(), self.original.running_var.double() + eps
        ratio = (new_var + eps) / (old_var + eps)
        offset = old_mean - mean  # between these images and those of training
        norm.running_mean.copy_(new_mean - offset * ratio.sqrt())
        norm.running_var.copy_((var * ratio - eps).clamp(min=0))
        if norm.affine:
            deviations = (old_sample_var * new_sample_var).sqrt()
            correlation = ((cov + TINY) / (deviations + TINY)).clamp(0, 1)
            weight = self.original.weight.double()
            norm.weight.copy_(weight * correlation)
            norm.bias.copy_(self.original.bias.double()
                            + weight * (1 - correlation) * offset / var.sqrt())

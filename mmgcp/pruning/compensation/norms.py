# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Least squares compensation: each BatchNorm makes of its new inputs what comes next to the old.

Without some channels a layer's outputs have another mean, a smaller variance, and are not
the same as before but for a factor. Were only the means mended, the variances would shrink from
layer to layer, as in a network between two others (variance collapse, `REPAIR (arXiv 2211.08403)
<https://arxiv.org/abs/2211.08403>`_). So the statistics of each BatchNorm become those of
its new inputs, as in `EagleEye (arXiv 2007.02491) <https://arxiv.org/abs/2007.02491>`_, and its
scale is multiplied by the correlation of new and old inputs, which makes its outputs the least
squares estimates of the old ones from the new inputs, channel by channel. Where nothing has
changed, the correlation is 1 and the BatchNorm stays what it was. A BatchNorm's eps is added to
all variances, so that what has nearly vanished is not blown up.
"""
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from mmgcp.nn.forward import eval_mode, run_as_tensors
from mmgcp.nn.hooks import hooked

# Values of a channel in a batch, at random places, that correlations are estimated from
NUM_SAMPLES = 1024
TINY = 1e-12


@torch.no_grad()
def adapt_norms(model: nn.Module, reference: nn.Module, images: Iterable[Tensor]) -> None:
    """Let the BatchNorms of a changed model emit what comes next to those of the original.

    Both models run side by side, and in the changed one each BatchNorm is adapted to the
    batch before it computes, so that those behind it see inputs as they will be. What all
    batches have in common is put into their statistics, scales and shifts at the end. The
    memory that it takes does not depend on the number of batches.

    A BatchNorm without running statistics, or that runs several times for an image, as in
    heads that share it, is left alone; one without scales gets the statistics alone.

    Args:
        model (nn.Module): The model, with channels off. Its BatchNorms change in place.
        reference (nn.Module): A copy of the model as it was, which stays as it is.
        images (Iterable[Tensor]): Batches (N, C, H, W). They are gone through once.
    """
    originals = _find_norms(reference)
    pairs = [_Pair(norm, originals[name]) for name, norm in _find_norms(model).items()]
    handles = [handle for pair in pairs for handle in pair.watch()]
    like = next(model.parameters())
    with hooked(handles), eval_mode(model), eval_mode(reference):
        for number, batch in enumerate(images):
            batch = batch.to(like)
            for pair in pairs:
                pair.begin(number)
            run_as_tensors(reference, batch)
            with ExitStack() as kept:
                for pair in pairs:
                    kept.enter_context(pair.kept())
                run_as_tensors(model, batch)
    for pair in pairs:
        pair.adapt_to_all()


def _find_norms(model: nn.Module) -> Dict[str, _BatchNorm]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.running_mean is not None}


@dataclass(frozen=True)
class _Moments:
    """Of the values of C channels in both models, the old one first.

    Attributes:
        mean, var (Tensor): Means and variances (2, C) of all values.
        sample_var (Tensor): Variances (2, C) of the samples.
        sample_cov (Tensor): Their covariances (C, ).
        count (int): Number of values of a channel.
    """
    mean: Tensor
    var: Tensor
    sample_var: Tensor
    sample_cov: Tensor
    count: int

    def __add__(self, other: '_Moments') -> '_Moments':
        """Average moments; variances are those within the batches."""
        count = self.count + other.count
        return _Moments(*((self.count * mine + other.count * theirs) / count for mine, theirs in (
            (self.mean, other.mean), (self.var, other.var), (self.sample_var, other.sample_var),
            (self.sample_cov, other.sample_cov))), count)

    @property
    def correlation(self) -> Tensor:
        """Correlations (C, ) of old and new values, 0 where they are negative."""
        product = self.sample_var.prod(0).sqrt()
        return ((self.sample_cov + TINY) / (product + TINY)).clamp(0, 1)


@dataclass
class _Look:
    """What is remembered of the inputs of a BatchNorm for a batch."""
    mean: Tensor
    var: Tensor
    samples: Tensor
    count: int

    @classmethod
    def at(cls, inputs: Tensor, seed: int) -> '_Look':
        """Look at inputs (N, C, ...); the same places are sampled in both models."""
        values = inputs.movedim(1, -1)
        if values.dtype in (torch.float16, torch.bfloat16):
            values = values.float()
        var, mean = torch.var_mean(values, list(range(values.dim() - 1)), unbiased=False)
        count = values[..., 0].numel()
        generator = torch.Generator().manual_seed(seed)
        if count <= NUM_SAMPLES:
            samples = values.flatten(0, -2)
        else:
            samples = values[tuple(torch.randint(size, (NUM_SAMPLES, ), generator=generator)
                                   for size in values.shape[:-1])]
        return cls(mean.double(), var.double(), samples.double(), count)


@dataclass
class _Pair:
    """A BatchNorm in both models.

    Attributes:
        norm (_BatchNorm): That of the changed model.
        original (_BatchNorm): That of the reference.
        total (_Moments): Of all batches.
        looks (List[_Look]): At the inputs of the original, for this batch.
        seed (int): Of the samples' places in this batch.
    """
    norm: _BatchNorm
    original: _BatchNorm
    total: Optional[_Moments] = None
    looks: List[_Look] = field(default_factory=list)
    seed: int = 0

    def watch(self) -> Tuple:
        return (self.original.register_forward_pre_hook(self._look),
                self.norm.register_forward_pre_hook(self._adapt_to_batch))

    def begin(self, number: int) -> None:
        """Begin with another batch."""
        self.looks, self.seed = [], number

    def _look(self, _: nn.Module, args: Tuple) -> None:
        self.looks.append(_Look.at(args[0], self.seed))

    def _adapt_to_batch(self, _: nn.Module, args: Tuple) -> None:
        if len(self.looks) != 1:
            return
        (old, ), new = self.looks, _Look.at(args[0], self.seed)
        centred = [look.samples - look.samples.mean(0) for look in (old, new)]
        moments = _Moments(
            torch.stack((old.mean, new.mean)), torch.stack((old.var, new.var)),
            torch.stack([samples.square().mean(0) for samples in centred]),
            (centred[0] * centred[1]).mean(0), old.count)
        self.total = moments if self.total is None else self.total + moments
        self._adapt_to(moments)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Take changes of the BatchNorm back at the end."""
        saved = [(tensor, tensor.detach().clone()) for tensor in self._tensors()]
        try:
            yield
        finally:
            for tensor, value in saved:
                tensor.copy_(value)

    def _tensors(self) -> List[Tensor]:
        norm = self.norm
        return [norm.running_mean, norm.running_var, *norm.parameters()]

    def adapt_to_all(self) -> None:
        """Adapt the BatchNorm to all batches."""
        if self.total is not None:
            self._adapt_to(self.total)

    def _adapt_to(self, moments: _Moments) -> None:
        norm, eps, correlation = self.norm, self.norm.eps, moments.correlation
        mean, var = self.original.running_mean.double(), self.original.running_var.double() + eps
        ratio = (moments.var[1] + eps) / (moments.var[0] + eps)
        offset = moments.mean[0] - mean  # of these images from those of training
        norm.running_mean.copy_(moments.mean[1] - offset * ratio.sqrt())
        norm.running_var.copy_((var * ratio - eps).clamp(min=0))
        if norm.affine:
            weight = self.original.weight.double()
            norm.weight.copy_(weight * correlation)
            norm.bias.copy_(self.original.bias.double()
                            + weight * (1 - correlation) * offset / var.sqrt())

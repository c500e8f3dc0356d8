# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss that kernels are scored by and fitted to."""
from dataclasses import dataclass
from typing import Iterable, Iterator, List, Optional

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR

from mmgcp.nn.distributed import average_gradients, in_step, sum_over_ranks, total_over_ranks
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.layerwise.consumers import ConsumerKernels
from mmgcp.pruning.units import ChannelUnit

from .attached import Auxiliary, FindTargets, clipped_step
from .reconstructor import Reconstructor, View
from .settings import AuxiliarySettings


@dataclass
class JointLoss:
    r"""The loss of a channel unit as a function of the kernels W that read its C channels.

    .. math:: L = \lambda L_{re} + \alpha L_{aux},
        \quad L_{re} = \sum_{consumers} \frac{1}{Q} \lVert F - X * W \rVert^2

    F is the output of a consumer in the original model, with Q values, and X its input now
    (LCP, `arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_; DCP, `arXiv 1810.11809
    <https://arxiv.org/abs/1810.11809>`_, equation 2). It is the mean over all batches of all ranks.

    The model is in :func:`mmgcp.nn.training_loss.loss_mode`; of its parameters only the weights
    of ``kernels`` require gradients. Without an auxiliary network there is only reconstruction.
    For the meaning of ``centred`` see :meth:`Reconstructor.error`.
    """
    model: nn.Module
    unit: ChannelUnit
    batches: Iterable[Batch]
    kernels: ConsumerKernels
    reconstructor: Reconstructor
    reconstruction_weight: float  # lambda
    auxiliary: Optional[Auxiliary]
    find_targets: FindTargets
    settings: AuxiliarySettings

    @torch.no_grad()
    def mean(self) -> float:
        """Compute the mean loss of all batches."""
        losses = [float(self._loss(view, centred=False)) for view in self._views()]
        return total_over_ranks(float(sum(losses))) / max(total_over_ranks(len(losses)), 1)

    def mean_gradients(self, centred: bool) -> List[Tensor]:
        """Compute the gradient of the mean loss for each weight of the kernels."""
        weights, count = self.kernels.weights, 0
        total = [torch.zeros_like(weight) for weight in weights]
        for view in self._views():
            count += 1
            for sums, grad in zip(total, torch.autograd.grad(self._loss(view, centred), weights)):
                sums += grad
        count = max(total_over_ranks(count), 1)
        return [sum_over_ranks(sums) / count for sums in total]

    def minimise(self, selected: Tensor, epochs: int, centred: bool) -> None:
        """Fit the kernels by SGD, except those of channels of the unit not selected (C, ).

        Each step is for a batch of each rank that has one left.
        """
        weights, masks = self.kernels.weights, self.kernels.masks(selected)
        optimizer = torch.optim.SGD(weights, self.settings.lr, self.settings.momentum)
        schedule = MultiStepLR(optimizer, list(self.settings.lr_steps), gamma=0.1)
        for _ in range(epochs):
            for view in in_step(self._views()):
                if view is not None:
                    self._loss(view, centred).backward()
                average_gradients(weights, active=view is not None)
                for weight, mask in zip(weights, masks):
                    weight.grad.mul_(mask)
                clipped_step(optimizer)
            schedule.step()

    def score(self, centred: bool) -> Tensor:
        """Score the channels of the unit in rounds, beginning without any of them.

        Each round but the last selects an equal share of the channels, those with the largest
        gradients, and fits their kernels. A generalisation of algorithm 2 of DCP, which selects
        one channel in a round. The weights of the kernels change.

        The scores (C, ) are in double precision. With one round, they are the squared norms of
        the gradients. With several, the integer part is the number of rounds left after the one
        that selects the channel, and the fractional part, at most 1/2, its share of the largest
        norm in the last round in which it was scored.
        """
        kernels, rounds = self.kernels, self.settings.rounds
        selected = torch.zeros(self.unit.size, dtype=torch.bool)
        scores = torch.zeros(self.unit.size, dtype=torch.double)
        values = kernels.copy()
        kernels.restore_channels([torch.zeros_like(value) for value in values], ~selected)
        for rounds_left in range(rounds, 0, -1):
            others = (~selected).nonzero().flatten()
            if not len(others):
                break
            norms = kernels.norms(self.mean_gradients(centred))
            if rounds == 1:
                return norms
            shares = norms[others] / norms[others].max().clamp(min=1e-300)
            scores[others] = rounds_left - 1 + shares / 2
            if rounds_left > 1:
                number = -(-len(others) // rounds_left)
                best = others[norms[others].argsort(descending=True, stable=True)[:number]]
                kernels.restore_channels(values, self.unit.mask(best))
                selected[best] = True
                self.minimise(selected, self.settings.round_epochs, centred)
        return scores

    def _views(self) -> Iterator[View]:
        return self.reconstructor.views(self.model, self.unit, self.batches, self.find_targets)

    def _loss(self, view: View, centred: bool) -> Tensor:
        outputs = self.reconstructor.outputs(self.model, view)
        loss = self.reconstruction_weight * self.reconstructor.error(outputs, view, centred)
        if self.auxiliary is not None:
            loss = loss + self.settings.alpha * self.auxiliary.loss(outputs, view.targets)
        return loss

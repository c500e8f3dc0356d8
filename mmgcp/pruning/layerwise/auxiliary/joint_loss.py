# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The loss that kernels are scored by and fitted to."""
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, List, Optional

import torch
import torch.nn as nn
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR

from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.units import ChannelUnit

from .attached import Auxiliary
from .consumer_kernels import ConsumerKernels
from .optimisation import clipped_step, gradients_kept
from .reconstructor import Reconstructor, View
from .settings import AuxiliarySettings


@dataclass
class JointLoss:
    r"""The loss of a channel unit as a function of the kernels W that read its channels.

    .. math:: L = \lambda L_{re} + \alpha L_{aux},
        \quad L_{re} = \sum_{consumers} \frac{1}{Q} \lVert F - X * W \rVert^2

    F is the output of a consumer in the original model, with Q values, and X its input now
    (LCP, `arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_; DCP, `arXiv 1810.11809
    <https://arxiv.org/abs/1810.11809>`_, equation 2).

    Attributes:
        model (nn.Module): The model in :func:`mmgcp.nn.training_loss.loss_mode`. Of its
            parameters, the weights of ``kernels`` require gradients, and no others.
        unit (ChannelUnit): The unit, of size C.
        batches (Iterable[Batch]): Training batches. Losses are means over them.
        kernels (ConsumerKernels): The kernels.
        reconstructor (Reconstructor): Computes the reconstruction loss.
        reconstruction_weight (float): The factor lambda.
        auxiliary (Auxiliary, optional): Computes the auxiliary loss. Without it there is none.
        find_targets (Callable): Finds the targets of ``auxiliary``, given the original model and
            a batch.
        settings (AuxiliarySettings): The factor alpha, and how kernels are fitted.
    """
    model: nn.Module
    unit: ChannelUnit
    batches: Iterable[Batch]
    kernels: ConsumerKernels
    reconstructor: Reconstructor
    reconstruction_weight: float
    auxiliary: Optional[Auxiliary]
    find_targets: Callable[[nn.Module, Batch], Any]
    settings: AuxiliarySettings

    @torch.no_grad()
    def mean(self) -> float:
        """Compute the mean loss of all batches."""
        losses = [float(self._loss(view, False)) for view in self._views()]
        return sum(losses) / max(len(losses), 1)

    def mean_gradients(self, centred: bool) -> List[Tensor]:
        """Compute the gradients of the mean loss of all batches.

        Args:
            centred (bool): See :meth:`Reconstructor.error`.

        Returns:
            list[Tensor]: The gradient of each weight of the kernels.
        """
        total, number = [torch.zeros_like(weight) for weight in self.kernels.weights], 0
        for number, view in enumerate(self._views(), 1):
            loss = self._loss(view, centred)
            for sums, gradient in zip(total, torch.autograd.grad(loss, self.kernels.weights)):
                sums += gradient
        return [sums / max(number, 1) for sums in total]

    def minimise(self, selected: Tensor, epochs: int, centred: bool) -> None:
        """Fit the kernels by SGD, all but those of the unit's other channels.

        Args:
            selected (Tensor): Mask (C, ) of the channels of the unit whose kernels are fitted.
            epochs (int): Passes over the batches.
            centred (bool): See :meth:`Reconstructor.error`.
        """
        weights, masks = self.kernels.weights, self.kernels.masks(selected)
        optimizer = torch.optim.SGD(weights, self.settings.lr, self.settings.momentum)
        schedule = MultiStepLR(optimizer, list(self.settings.lr_steps), gamma=0.1)
        with gradients_kept(weights):
            for _ in range(epochs):
                for view in self._views():
                    self._loss(view, centred).backward()
                    for weight, mask in zip(weights, masks):
                        weight.grad.mul_(mask)
                    clipped_step(optimizer)
                schedule.step()

    def _views(self) -> Iterator[View]:
        def find_targets(original: nn.Module, batch: Batch) -> Any:
            return self.auxiliary and self.find_targets(original, batch)

        return self.reconstructor.views(self.model, self.unit, self.batches, find_targets)

    def _loss(self, view: View, centred: bool) -> Tensor:
        outputs = self.reconstructor.outputs(self.model, view)
        loss = self.reconstruction_weight * self.reconstructor.error(outputs, view, centred)
        if self.auxiliary is not None:
            loss = loss + self.settings.alpha * self.auxiliary.loss(outputs, view.targets)
        return loss

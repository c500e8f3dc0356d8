# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Layer-by-layer pruning guided by reconstruction and by auxiliary networks."""
import warnings
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any, Dict, Iterable, Iterator, Optional, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import from_first_rank
from mmgcp.nn.temporarily import only_values_change, requiring_grad, values_kept
from mmgcp.nn.training_loss import Batch, loss_mode
from mmgcp.pruning.layerwise.base import LayerwiseCriterion
from mmgcp.pruning.layerwise.consumers import ConsumerKernels, find_consumers
from mmgcp.pruning.scores.base import Progress
from mmgcp.pruning.units import ChannelUnit
from mmgcp.utils.checks import check_keys

from .attached import Auxiliary, attach, train_jointly, watch_consumers
from .joint_loss import JointLoss
from .reconstructor import Reconstructor
from .settings import AuxiliarySettings
from .targets import classes_of


class AuxiliaryCriterion(LayerwiseCriterion):
    """Keeps the channels that reconstruction and an auxiliary network need most.

    The common part of LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_) and DCP
    (`arXiv 1810.11809 <https://arxiv.org/abs/1810.11809>`_). For each channel unit:

    1. :meth:`begin` attaches an auxiliary network to the output of the unit's largest consumer,
       and trains all networks together with the detector. The detector is then copied: the
       outputs of the original layers are what the pruned ones have to reconstruct.
    2. :meth:`score` computes the gradient of the :class:`JointLoss` for the kernels of the unit's
       consumers while these read *none* of its channels, like the first step of DCP's greedy
       selection. (With all channels and unchanged kernels, the gradient of the reconstruction
       loss is zero.) The score of a channel is the squared norm of the gradient of the kernels
       that read it.
    3. :meth:`update` minimises the joint loss over the kernels of the channels that are kept.

    With several ``rounds``, each round selects an equal share of the channels: those with the
    highest scores get their kernels back, these are fitted, and the remaining channels are
    scored anew by what is still missing. Channels of earlier rounds have higher scores. In the
    papers, DCP selects one channel in a round, which takes too long for wide layers, and LCP all
    channels at once.

    If the means of removed channels are folded into their consumers (the default of
    :func:`mmgcp.pruning.prune`), constants that outputs lack are no error for the scores.
    Without folding, the method is that of the papers. Units whose consumers emit no feature maps
    have no auxiliary network; reconstruction alone decides about them.

    Several processes score with the mean gradient of the batches of all, as one process does. They
    train as usual in distributed training: each step is for the mean loss of one batch of each
    process, so that it is that of a larger batch, and there are fewer steps.

    Args:
        allocation_criterion (dict, optional): See :class:`LayerwiseCriterion`.
        **settings: See :class:`AuxiliarySettings`.
    """
    needs = 'losses'
    reconstruction_weight = 1.

    def __init__(self, allocation_criterion: Optional[dict] = None, **settings):
        super().__init__(allocation_criterion)
        known = [item.name for item in fields(AuxiliarySettings)]
        check_keys(settings, known, type(self).__name__, PruningError)
        self.settings = AuxiliarySettings(**settings)
        self.auxiliaries: Dict[str, Auxiliary] = {}  # by name of the unit
        self._num_classes = 0
        self._reconstructor: Optional[Reconstructor] = None

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        """Make a network with ``loss(feature, targets)`` for features (N, channels, H, W)."""
        raise NotImplementedError

    def find_targets(self, model: nn.Module, batch: Batch) -> Any:
        """Find what the auxiliary networks have to predict for a batch of the original model."""
        raise NotImplementedError

    def skips(self, model: nn.Module, unit: ChannelUnit) -> Optional[str]:
        """Refuse units whose channels no layer with weights reads."""
        return None if find_consumers(model, unit) else 'no layer with weights reads its channels'

    def begin(self, model: nn.Module, units: Sequence[ChannelUnit],
              batches: Iterable[Batch], progress: Progress) -> None:
        """Attach auxiliary networks, train them together with the detector, and copy it.

        The detector's trainable weights change, unless ``joint_lr`` is 0; the statistics of its
        normalisation do not. Raises a PruningError if there are no batches, if the detector's
        head does not tell what is needed, or if the training diverges.
        """
        first = next(iter(batches), None)
        calls = None if first is None else watch_consumers(model, units, first.images)
        # other ranks may have no batch, if any rank has one
        calls, num_images = from_first_rank((calls, 0 if first is None else len(first.images)))
        if calls is None:
            raise PruningError('the criterion needs training data, but there are no batches')
        self.auxiliaries = {}
        if self.settings.alpha:
            self._num_classes = classes_of(model)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.settings.seed)
                self.auxiliaries = attach(
                    model, units, calls, num_images,
                    partial(self.make_network, num_classes=self._num_classes))
                train_jointly(model, self.auxiliaries, self.find_targets, batches, progress,
                              self.settings)
        self._reconstructor = Reconstructor.of(model, calls, self.settings)

    def score(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch]) -> Tensor:
        """Return the scores (C, ) of :meth:`JointLoss.score`; PruningError if not finite."""
        with self.joint_loss(model, unit, batches) as loss, values_kept(loss.kernels.weights):
            loss.reconstructor.forget()
            scores = loss.score(centred=self.folded)
        if not bool(scores.isfinite().all()):
            raise PruningError(f'the scores of {unit.name} are not finite: has the training '
                               'diverged? Try a lower lr, or relative=True')
        return scores

    def update(self, model: nn.Module, unit: ChannelUnit, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Fit the kernels that read the remaining channels of a unit; nothing else changes.

        The views from :meth:`score` are still valid, with the removed channels now off. If fitting
        does not lower the mean loss of the batches, it is taken back with a warning.
        """
        with self.joint_loss(model, unit, batches) as loss:
            values, before = loss.kernels.copy(), loss.mean()
            loss.minimise(~unit.mask(removed), self.settings.epochs, centred=False)
            after = loss.mean()
        self._reconstructor.forget()
        if not after < before:
            loss.kernels.restore(values)
            if self.settings.epochs:
                warnings.warn(f'fitting the layers that read {unit.name} did not lower their '
                              f'loss ({before:.3g} before, {after:.3g} after) and is taken '
                              'back: try a lower lr, or relative=True', stacklevel=2)

    @contextmanager
    def joint_loss(self, model: nn.Module, unit: ChannelUnit,
                   batches: Iterable[Batch]) -> Iterator[JointLoss]:
        """Yield the joint loss of a unit; the model is prepared for it and restored at the end.

        Raises a PruningError if pruning has not begun, or if no consumer of the unit runs.
        """
        if self._reconstructor is None:
            raise PruningError('the criterion has not begun: call begin or load_state_dict')
        kernels = ConsumerKernels(model, unit, self._reconstructor.consumers(model, unit))
        auxiliary = self.auxiliaries.get(unit.name)
        if auxiliary is not None:
            auxiliary.network.to(next(model.parameters()))
        find_targets = (lambda *_: None) if auxiliary is None else self.find_targets
        with only_values_change(model), loss_mode(model), requiring_grad(model, kernels.weights):
            yield JointLoss(model, unit, batches, kernels, self._reconstructor,
                            self.reconstruction_weight, auxiliary, find_targets, self.settings)

    def state_dict(self) -> dict:
        """Return the networks and the weights of the original detector as plain data."""
        return dict(
            num_classes=self._num_classes,
            reconstructor=self._reconstructor and self._reconstructor.state_dict(),
            auxiliaries={name: item.state_dict() for name, item in self.auxiliaries.items()})

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned. Called in place of :meth:`begin`."""
        self._num_classes = state['num_classes']
        self._reconstructor = Reconstructor(**state['reconstructor'], settings=self.settings)
        make_network = partial(self.make_network, num_classes=self._num_classes)
        self.auxiliaries = {name: Auxiliary.from_state(item, make_network)
                            for name, item in state['auxiliaries'].items()}

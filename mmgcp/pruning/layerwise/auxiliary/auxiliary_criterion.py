# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Layer by layer pruning, led by reconstruction and by auxiliary networks."""
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import Batch, loss_mode
from mmgcp.pruning.layerwise.base import LayerwiseCriterion
from mmgcp.pruning.scores.base import Progress
from mmgcp.pruning.units import ChannelUnit

from .joint_training import train_jointly
from .kernels import Kernels, gradients_only_of, readers
from .lookahead import OutputsAhead
from .networks import Auxiliary
from .positives import number_of_classes
from .recording import Call, Outputs, copy_without_hooks, record_inputs, record_outputs, watch_calls
from .sgd import SGD


class AuxiliaryCriterion(LayerwiseCriterion):
    r"""Keeps the channels that reconstruction and an auxiliary network ask for most.

    What LCP (`arXiv 1911.02237 <https://arxiv.org/abs/1911.02237>`_) and DCP (`arXiv
    1810.11809 <https://arxiv.org/abs/1810.11809>`_) have in common. For each channel unit, the
    layers that read its channels are looked at, its consumers:

    1. :meth:`begin` attaches an auxiliary network to the output of the largest consumer of
       each unit, and trains all of them, together with the detector. Then the detector is
       copied: what its layers put out is what the pruned ones are to reconstruct.
    2. :meth:`score` computes the gradient of the joint loss

       .. math:: L = L_{re} + \alpha L_{aux},
           \quad L_{re} = \sum_{consumers} \frac{1}{Q} \lVert F - X_S * W_S \rVert^2

       for the kernels W of the consumers, as a mean over all batches, *without any channel of
       the unit* (S is empty, what DCP's greedy selection begins with; with all channels and
       unchanged weights the gradient of L_re would be zero). The score of a channel is the
       squared norm of the kernel slices that read it. F is the output of the copy, X_S the
       consumer's input, Q its number of values.
    3. :meth:`update` minimises L over the kernels that are kept, by SGD.

    With several ``rounds`` the channels are taken in as many shares: those with the highest
    scores get their kernels back, these are fitted, and the others are scored anew, by what
    is still missing. Channels of an earlier round have higher scores. DCP takes one channel
    each time, which is too slow for wide layers; LCP takes all at once.

    Where the mean of removed channels is folded into their consumers (the default of
    :func:`mmgcp.pruning.prune`), a constant that outputs lack is no error for the scores, and
    what BatchNorms have taken over counts as part of the outputs. Without, it is the papers'
    method.

    Sets whose consumers put out nothing but single cells or regions have no auxiliary network;
    reconstruction alone decides. Nothing of the networks or the copy is put into the model.

    Args:
        alpha (float): Weight of the auxiliary loss; 0 for reconstruction alone, without
            networks. Defaults to 1.
        rounds (int): Number of rounds. Defaults to 1.
        round_epochs (int): Passes over the batches to fit kernels after each round but the
            last. Defaults to 1.
        epochs (int): Passes over the batches in :meth:`update`. Defaults to 10.
        lr (float): Learning rate of the kernels. Defaults to 1e-3.
        lr_steps (Sequence[int]): Epochs after which it is divided by ten. Defaults to (5, ).
        momentum (float): Momentum of all SGD. Gradients have a norm of at most 10 in it.
            Defaults to 0.9.
        relative (bool): Divide the reconstruction loss of a layer by the mean square of its
            original output. Not in the papers; it makes one learning rate fit layers of any
            scale, as those of a VGG without normalisation. Defaults to False.
        aux_epochs (int): Passes over the batches to train the networks. Defaults to 5.
        aux_lr (float): Learning rate of the networks. Defaults to 0.01.
        joint_lr (float): Learning rate of the detector meanwhile; 0 to leave it alone.
            Defaults to 1e-4.
        seed (int): Seed of the initial weights. Defaults to 0.
        cache_mib (float): Memory, in MiB on the detector's device, for what the consumers of a
            set read and put out originally, which is the same all the time that their kernels are
            fitted; for batches that do not fit, both detectors run again in each pass. As much
            again is used for what the consumers of the next units put out originally. Defaults
            to 256.
        allocation_criterion (dict, optional): See :class:`mmgcp.pruning.LayerwiseCriterion`.
    """
    needs = 'losses'
    reconstruction_weight = 1.

    def __init__(self,
                 alpha: float = 1.,
                 rounds: int = 1,
                 round_epochs: int = 1,
                 epochs: int = 10,
                 lr: float = 1e-3,
                 lr_steps: Sequence[int] = (5, ),
                 momentum: float = 0.9,
                 relative: bool = False,
                 aux_epochs: int = 5,
                 aux_lr: float = 0.01,
                 joint_lr: float = 1e-4,
                 seed: int = 0,
                 cache_mib: float = 256.,
                 allocation_criterion: Optional[dict] = None):
        super().__init__(allocation_criterion)
        if rounds < 1:
            raise PruningError(f'rounds must be at least 1, but is {rounds}')
        self.alpha = alpha
        self.rounds = rounds
        self.round_epochs = round_epochs
        self.epochs = epochs
        self.lr = lr
        self.lr_steps = tuple(lr_steps)
        self.momentum = momentum
        self.relative = relative
        self.aux_epochs = aux_epochs
        self.aux_lr = aux_lr
        self.joint_lr = joint_lr
        self.seed = seed
        self.cache_mib = cache_mib
        # layer -> the BatchNorm that reads its output, for each call
        self._norms: Dict[str, List[str]] = {}
        self._auxiliaries: Dict[str, Auxiliary] = {}
        self._num_classes = 0
        self._views: Dict[Tuple[str, int], _View] = {}  # by set and number of the batch
        self._order: Dict[str, List[str]] = {}  # set -> its consumers
        self._sizes: Dict[str, int] = {}  # consumer -> bytes that it puts out for a batch
        self._ahead: Optional[OutputsAhead] = None
        self._baseline: Optional[nn.Module] = None
        self._baseline_weights: Optional[Dict[str, Tensor]] = None

    def make_network(self, channels: int, num_classes: int) -> nn.Module:
        """Make an auxiliary network for a feature map.

        Args:
            channels (int): Number of channels of the feature map.
            num_classes (int): Number of classes.

        Returns:
            nn.Module: It has a method ``loss(feature, targets)``.
        """
        raise NotImplementedError

    def find_targets(self, model: nn.Module, batch: Batch):
        """Find what the networks are to say of a batch.

        Args:
            model (nn.Module): The original detector.
            batch (Batch): The batch.
        """
        raise NotImplementedError

    def skips(self, model: nn.Module, unit: ChannelUnit) -> Optional[str]:
        """Say whether no layer with weights reads a unit."""
        return None if readers(model, unit) else 'no layer with weights reads its channels'

    def begin(self, model: nn.Module, units: Sequence[ChannelUnit],
              batches: Iterable[Batch], progress: Progress) -> None:
        """Attach auxiliary networks and train them together with the detector, then copy it.

        Args:
            model (nn.Module): The detector. Its trainable weights change, unless ``joint_lr``
                is 0; the statistics of its normalisation do not.
            units (Sequence[ChannelUnit]): The units that will be pruned.
            batches (Iterable[Batch]): Training batches with ground truth.
            progress (Callable): Called with a stage, the steps done in it, and all its steps.

        Raises:
            PruningError: There are no batches, the detector's head is of no use, or the
                training diverges.
        """
        first = next(iter(batches), None)
        if first is None:
            raise PruningError('the criterion needs training data, but there are no batches')
        layers = {name: None for unit in units for name in readers(model, unit)}
        with loss_mode(model):
            calls = watch_calls(model, first.images, layers)
        self._norms = {name: [call.norm for call in found] for name, found in calls.items()}
        self._order = {unit.name: [name for name in readers(model, unit) if calls[name]]
                       for unit in units}
        width = next(model.parameters()).element_size()
        self._sizes = {name: width * sum(call.shape.numel() for call in found)
                       for name, found in calls.items()}
        self._auxiliaries = {}
        if self.alpha:
            self._num_classes = number_of_classes(model)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.seed)
                self._attach(model, units, calls, len(first.images))
                train_jointly(model, self._auxiliaries, self.find_targets, batches, progress,
                              epochs=self.aux_epochs, lr=self.aux_lr, joint_lr=self.joint_lr,
                              momentum=self.momentum)
        self._baseline = copy_without_hooks(model)
        self._look_ahead()

    def _look_ahead(self) -> None:
        counts = {name: len(found) for name, found in self._norms.items()}
        self._ahead = OutputsAhead(self._order, counts, self._sizes, self.cache_mib * 2**20)

    def score(self, model: nn.Module, unit: ChannelUnit,
              batches: Iterable[Batch]) -> Tensor:
        """Score the channels of a unit; leaves the model as it was.

        Args:
            model (nn.Module): The model.
            unit (ChannelUnit): The unit, of size C.
            batches (Iterable[Batch]): Training batches.

        Returns:
            Tensor: Scores (C, ): squared norms of gradients if there is one round. With
            several, whole numbers count the rounds after the one a channel is chosen in, and
            fractions below 1/2 are shares of the largest norm.

        Raises:
            PruningError: The scores are not finite.
        """
        kernels = self._kernels(model, unit)
        originals = kernels.copy()
        self._views.clear()
        with self._ready(model, kernels):
            try:
                scores = self._choose(model, unit, kernels, originals, batches)
            finally:
                kernels.restore(originals)
        if not bool(scores.isfinite().all()):
            raise PruningError(f'the scores of {unit.name} are not finite: has the training '
                               'diverged? Try a lower lr, or relative=True')
        return scores

    def update(self, model: nn.Module, unit: ChannelUnit, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Fit the kernels that read what is left of a unit; nothing else changes.

        What these layers read, and what they emitted originally, is known from :meth:`score`:
        but for the removed channels, which the layers take as zeros, it is still the same.

        If that does not lower the mean loss of the batches, there is a warning and the kernels
        are as before.

        Args:
            model (nn.Module): The model, with these channels off already.
            unit (ChannelUnit): The unit.
            removed (Tensor): Ascending indices (K, ) of its removed channels.
            batches (Iterable[Batch]): Training batches.
        """
        kernels = self._kernels(model, unit)
        originals = kernels.copy()
        with self._ready(model, kernels):
            before = self._mean_loss(model, unit, batches)
            self._fit(model, unit, kernels, ~unit.mask(removed), batches, self.epochs,
                      centred=False)
            after = self._mean_loss(model, unit, batches)
        self._views.clear()
        if not after < before:
            kernels.restore(originals)
            if self.epochs:
                warnings.warn(f'fitting the layers that read {unit.name} did not lower their '
                              f'loss ({before:.3g} before, {after:.3g} after) and is taken '
                              'back: try a lower lr, or relative=True')

    def joint_loss(self, model: nn.Module, unit: ChannelUnit, batch: Batch,
                   centred: bool = False, view: Optional['_View'] = None) -> Tensor:
        """Compute the loss that channels of a unit are scored by and kernels fitted to.

        Args:
            model (nn.Module): The model, in :func:`mmgcp.nn.training_loss.loss_mode`.
            unit (ChannelUnit): The unit.
            batch (Batch): A batch.
            centred (bool): Whether a constant that an output channel lacks in the whole batch
                does not count as an error. Defaults to False.
            view (_View, optional): What else there is to know of the batch, found before.

        Returns:
            Tensor: The reconstruction losses of all consumers, and the auxiliary loss.
        """
        view = view or self._look(model, unit, batch)
        if view.inputs is None:
            calls = {name: len(items) for name, items in view.expected.items()}
            outputs = record_outputs(model, batch.images, calls)
        else:
            outputs = {name: [model.get_submodule(name)(item) for item in inputs]
                       for name, inputs in view.inputs.items()}
        found = self._with_offsets(model, outputs)
        loss = batch.images.new_zeros(())
        for name, items in view.expected.items():
            for now, before in zip(found[name], items):
                loss = loss + self.reconstruction_weight * self._error(now, before, centred)
        if unit.name in self._auxiliaries:
            loss = loss + self.alpha * self._auxiliaries[unit.name].loss(found, view.targets)
        return loss

    def _look(self, model: nn.Module, unit: ChannelUnit, batch: Batch,
              number: Optional[int] = None) -> '_View':
        """Find all of a batch that does not depend on the kernels that are fitted."""
        baseline = self._original(model)
        calls = {name: len(self._norms[name]) for name in self._consumers(unit)}
        with loss_mode(baseline), torch.no_grad():
            targets = None
            if unit.name in self._auxiliaries:
                targets = self.find_targets(baseline, batch)
            if number is None:
                expected = record_outputs(baseline, batch.images, calls)
            else:
                expected = self._ahead(baseline, unit.name, number, batch.images)
        return _View(targets, expected, record_inputs(model, batch.images, calls))

    def _viewed(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch]
                ) -> Iterator[Tuple[Batch, '_View']]:
        """Go through the batches; views of the first ones, as they fit, are kept."""
        for number, batch in enumerate(batches):
            key = unit.name, number
            view = self._views.get(key)
            if view is None:
                view = self._look(model, unit, batch, number)
                size = view.size + sum(kept.size for kept in self._views.values())
                if size <= self.cache_mib * 2**20:
                    self._views[key] = view
            yield batch, view

    def state_dict(self) -> dict:
        """Return the networks and the weights of the detector's copy, as plain data."""
        weights = self._baseline_weights
        if self._baseline is not None:
            weights = self._baseline.state_dict()
        return dict(
            baseline=weights,
            num_classes=self._num_classes,
            norms=dict(self._norms),
            order=dict(self._order),
            sizes=dict(self._sizes),
            auxiliaries={
                name: dict(layer=item.layer, call=item.call, channels=item.channels,
                           weights=item.network.state_dict())
                for name, item in self._auxiliaries.items()
            })

    def load_state_dict(self, state: dict) -> None:
        """Take over what :meth:`state_dict` returned, instead of :meth:`begin`."""
        self._baseline, self._baseline_weights = None, state['baseline']
        self._num_classes, self._norms = state['num_classes'], dict(state['norms'])
        self._order, self._sizes = dict(state['order']), dict(state['sizes'])
        self._look_ahead()
        self._auxiliaries = {}
        for name, item in state['auxiliaries'].items():
            with torch.random.fork_rng(devices=[]):
                network = self.make_network(item['channels'], self._num_classes)
            network.load_state_dict(item['weights'])
            self._auxiliaries[name] = Auxiliary(item['layer'], item['call'], item['channels'],
                                                network.eval().requires_grad_(False))

    def _attach(self, model: nn.Module, units: Sequence[ChannelUnit],
                calls: Dict[str, List[Call]], num_images: int) -> None:
        """Make the networks; ``calls`` are those of all consumers for some images."""
        like = next(model.parameters())
        for unit in units:
            places = [(call.shape.numel(), name, number, call.shape[1])
                      for name in readers(model, unit)
                      for number, call in enumerate(calls[name])
                      if _is_map(call.shape, num_images)]
            if places:
                # of several that are as large, the first
                _, name, number, channels = max(places, key=lambda place: place[0])
                network = self.make_network(channels, self._num_classes).to(like)
                self._auxiliaries[unit.name] = Auxiliary(name, number, channels, network)

    def _original(self, model: nn.Module) -> nn.Module:
        """The copy of the detector; after a resumption it is made from the pruned one."""
        if self._baseline is None:
            if self._baseline_weights is None:
                raise PruningError('the criterion has not begun: call begin or load_state_dict')
            self._baseline = copy_without_hooks(model)
            self._baseline.load_state_dict(self._baseline_weights)
            for item in self._auxiliaries.values():
                item.network.to(next(model.parameters()))
        return self._baseline

    def _consumers(self, unit: ChannelUnit) -> List[str]:
        """Names of the layers that read the channels of a unit, as far as they run."""
        names = self._order.get(unit.name)
        if not names:
            raise PruningError(f'no layer that runs reads the channels of {unit.name}')
        return names

    def _kernels(self, model: nn.Module, unit: ChannelUnit) -> Kernels:
        self._original(model)
        return Kernels(model, unit, self._consumers(unit))

    @contextmanager
    def _ready(self, model: nn.Module, kernels: Kernels) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(loss_mode(model))
            stack.enter_context(gradients_only_of(model, kernels.weights))
            yield

    def _with_offsets(self, model: nn.Module, outputs: Outputs) -> Outputs:
        """Add to outputs what was folded into the means of the BatchNorms that read them."""
        baseline = self._original(model)

        def add(output: Tensor, norm: str) -> Tensor:
            before, now = (owner.get_submodule(norm) for owner in (baseline, model))
            if not norm or now.running_mean is None:
                return output
            offset = before.running_mean - now.running_mean
            return output + offset.view(-1, *[1] * (output.dim() - 2))

        return {name: [add(*pair) for pair in zip(found, self._norms[name])]
                for name, found in outputs.items()}

    def _error(self, found: Tensor, expected: Tensor, centred: bool) -> Tensor:
        """The mean squared error of an output."""
        error = found - expected
        if centred:
            dims = [0, *range(2, error.dim())] if error.dim() > 3 else [*range(error.dim() - 1)]
            error = error - error.mean(dims, keepdim=True)
        error = error.square().mean()
        return error / expected.square().mean().clamp(min=1e-12) if self.relative else error

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, unit: ChannelUnit,
                   batches: Iterable[Batch]) -> float:
        losses = [float(self.joint_loss(model, unit, batch, view=view))
                  for batch, view in self._viewed(model, unit, batches)]
        return sum(losses) / max(len(losses), 1)

    def _mean_gradients(self, model: nn.Module, unit: ChannelUnit, kernels: Kernels,
                        batches: Iterable[Batch]) -> List[Tensor]:
        """The gradients of the mean loss of all batches."""
        total, number = [torch.zeros_like(weight) for weight in kernels.weights], 0
        for number, item in enumerate(self._viewed(model, unit, batches), 1):
            loss = self.joint_loss(model, unit, item[0], self.folded, item[1])
            for sums, gradient in zip(total, torch.autograd.grad(loss, kernels.weights)):
                sums += gradient
        return [sums / max(number, 1) for sums in total]

    def _choose(self, model: nn.Module, unit: ChannelUnit, kernels: Kernels,
                originals: Sequence[Tensor], batches: Iterable[Batch]) -> Tensor:
        """Choose channels in rounds, on kernels that lack those not chosen yet."""
        selected = torch.zeros(unit.size, dtype=torch.bool)
        scores = torch.zeros(unit.size, dtype=torch.double)
        for weight, mask in zip(kernels.weights, kernels.masks(selected)):
            weight.detach().mul_(mask)
        for rounds_left in range(self.rounds, 0, -1):
            others = (~selected).nonzero().flatten()
            if not len(others):
                break
            norms = kernels.norms(self._mean_gradients(model, unit, kernels, batches))
            if self.rounds == 1:
                return norms
            shares = norms[others] / norms[others].max().clamp(min=1e-300)
            scores[others] = rounds_left - 1 + shares / 2
            if rounds_left > 1:
                number = -(-len(others) // rounds_left)
                best = others[norms[others].argsort(descending=True, stable=True)[:number]]
                self._give_back(kernels, originals, selected, best)
                self._fit(model, unit, kernels, selected, batches, self.round_epochs,
                          centred=self.folded)
        return scores

    @staticmethod
    def _give_back(kernels: Kernels, originals: Sequence[Tensor], selected: Tensor,
                   chosen: Tensor) -> None:
        """Select channels, and give the kernels that read them their original values."""
        before = kernels.masks(selected)
        selected[chosen] = True
        for weight, original, old, new in zip(kernels.weights, originals, before,
                                              kernels.masks(selected)):
            weight.detach().copy_(torch.where(new & ~old, original, weight.detach()))

    def _fit(self, model: nn.Module, unit: ChannelUnit, kernels: Kernels,
             selected: Tensor, batches: Iterable[Batch], epochs: int, centred: bool) -> None:
        """Minimise the joint loss over the kernels that do not read the other channels."""
        masks = kernels.masks(selected)
        optimizer = SGD(kernels.weights, self.lr, self.momentum)
        for epoch in range(epochs):
            optimizer.lr = self.lr * 0.1**sum(epoch >= step for step in self.lr_steps)
            for batch, view in self._viewed(model, unit, batches):
                loss = self.joint_loss(model, unit, batch, centred, view)
                gradients = torch.autograd.grad(loss, kernels.weights)
                optimizer.step([gradient * mask for gradient, mask in zip(gradients, masks)])


@dataclass
class _View:
    """What losses for a batch have in common while the kernels of consumers are fitted.

    Attributes:
        targets (object): Of the auxiliary network.
        expected (dict[str, list[Tensor]]): Outputs of the original consumers.
        inputs (dict[str, list[Tensor]], optional): Inputs of the consumers; None if they are
            not the same all the time.
    """
    targets: object
    expected: Outputs
    inputs: Optional[Outputs]

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(item.nelement() * item.element_size()
                   for outputs in (self.expected, self.inputs or {})
                   for items in outputs.values() for item in items)


def _is_map(shape: torch.Size, num_images: int) -> bool:
    """Whether a shape is that of a feature map of whole images, of more than one cell."""
    return len(shape) == 4 and shape[0] == num_images and shape[2:].numel() > 1

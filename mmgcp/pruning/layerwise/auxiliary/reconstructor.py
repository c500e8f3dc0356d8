# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What the consumers of a channel unit emit, compared with what they emitted originally."""
import copy
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.calls import Calls
from mmgcp.nn.forward import ShortRuns
from mmgcp.nn.hooks import recording
from mmgcp.nn.training_loss import Batch, loss_mode
from mmgcp.pruning.layerwise.consumers import find_consumers
from mmgcp.pruning.units import ChannelUnit

from .attached import Outputs
from .settings import AuxiliarySettings
from .view import View

# The targets of an auxiliary network for a batch, found with the original model
FindTargets = Callable[[nn.Module, Batch], Any]


class Reconstructor:
    """Compares outputs of consumers with those in the original model.

    It owns a copy of the original model, and views of the batches for the current unit.

    Args:
        norms (Mapping[str, list[str]]): By name of each consumer of any unit, for each of its
            calls in a forward pass: name of the BatchNorm that reads its output, or ``''``.
        weights (Mapping[str, Tensor]): The ``state_dict`` of the original model.
        settings (AuxiliarySettings): The memory for views, and whether errors are relative.
    """

    def __init__(self, norms: Mapping[str, List[str]], weights: Mapping[str, Tensor],
                 settings: AuxiliarySettings):
        self._norms = dict(norms)
        self._weights = dict(weights)
        self._original: Optional[nn.Module] = None
        self._settings = settings
        self._views: Dict[Tuple[str, int], View] = {}  # by unit and number of the batch

    @classmethod
    def of(cls, model: nn.Module, calls: Calls, settings: AuxiliarySettings) -> 'Reconstructor':
        """Make a reconstructor of a model, given the calls of all consumers in a forward pass."""
        norms = {name: [call.norms[-1] if call.norms else '' for call in found]
                 for name, found in calls.items()}
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        return cls(norms, weights, settings)

    def state_dict(self) -> dict:
        """Return the first two arguments of the constructor as plain data."""
        return dict(norms=dict(self._norms), weights=dict(self._weights))

    def original(self, model: nn.Module) -> nn.Module:
        """Return the copy of the original model.

        Args:
            model (nn.Module): The model in its current state: the same layers, perhaps with
                other weights, and with hooks, which the copy does not have.
        """
        if self._original is None:
            self._original = copy.deepcopy(model).requires_grad_(False)
            for module in self._original.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()
            self._original.load_state_dict(self._weights)
            self._weights = dict(self._original.state_dict())  # the same memory
        return self._original

    def consumers(self, model: nn.Module, unit: ChannelUnit) -> List[str]:
        """Return the names of a unit's consumers that run.

        Raises:
            PruningError: There are none.
        """
        names = [name for name in find_consumers(model, unit) if self._norms[name]]
        if not names:
            raise PruningError(f'no layer that runs reads the channels of {unit.name}')
        return names

    def views(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch],
              find_targets: FindTargets) -> Iterator[View]:
        """Look at batches, as far as possible from memory; see :meth:`forget`.

        Args:
            model (nn.Module): The model in its current state, in
                :func:`mmgcp.nn.training_loss.loss_mode`. Of its parameters, those that are
                fitted require gradients, and no others.
            unit (ChannelUnit): The unit.
            batches (Iterable[Batch]): Training batches.
            find_targets (Callable): Finds the targets of the unit's auxiliary network.

        Yields:
            View: What there is to know of each batch.
        """
        for number, batch in enumerate(batches):
            view = self._views.get((unit.name, number))
            if view is None:
                view = self._look(model, unit, batch, find_targets)
                size = view.size + sum(kept.size for kept in self._views.values())
                if size <= self._settings.cache_mib * 2**20:
                    self._views[unit.name, number] = view
            yield view

    def forget(self) -> None:
        """Forget all views: the model before the consumers of a unit is going to change."""
        self._views.clear()

    def outputs(self, model: nn.Module, view: View) -> Outputs:
        """Compute what the consumers emit, with their current kernels.

        What was folded into the running mean of a BatchNorm counts as a part of the output
        that it reads.

        Args:
            model (nn.Module): The model in its current state.
            view (View): A view of a batch.

        Returns:
            dict[str, list[Tensor]]: The outputs of each consumer, call by call.
        """
        if view.inputs is None:
            found = self._record(model, view.images, view.expected)
        else:
            found = {name: [model.get_submodule(name)(item) for item in items]
                     for name, items in view.inputs.items()}
        return {name: [self._with_folded(model, output, norm)
                       for output, norm in zip(outputs, self._norms[name])]
                for name, outputs in found.items()}

    def error(self, outputs: Outputs, view: View, centred: bool) -> Tensor:
        """Compute how much the consumers' outputs differ from the original ones.

        Args:
            outputs (dict[str, list[Tensor]]): What :meth:`outputs` returned.
            view (View): The view of the batch.
            centred (bool): Whether constants that output channels lack over the whole batch
                do not count, as they can be folded.

        Returns:
            Tensor: The mean squared errors of all consumers and calls, summed up.
        """
        errors = []
        for name, items in view.expected.items():
            for found, expected in zip(outputs[name], items):
                error = found - expected
                if centred:
                    dims = [0, *range(2, error.dim())] if error.dim() > 3 else [
                        *range(error.dim() - 1)]
                    error = error - error.mean(dims, keepdim=True)
                scale = expected.square().mean().clamp(min=1e-12) if self._settings.relative else 1
                errors.append(error.square().mean() / scale)
        return torch.stack(errors).sum()

    def _look(self, model: nn.Module, unit: ChannelUnit, batch: Batch,
              find_targets: FindTargets) -> View:
        original, names = self.original(model), self.consumers(model, unit)
        with loss_mode(original), torch.no_grad():
            targets = find_targets(original, batch)
            expected = self._record(original, batch.images, names)
        with torch.enable_grad():
            inputs = self._record(model, batch.images, names, inputs=True)
        fixed = not any(item.requires_grad for items in inputs.values() for item in items)
        return View(expected, inputs if fixed else None, None if fixed else batch.images, targets)

    def _record(self, model: nn.Module, images: Tensor, names: Iterable[str],
                inputs: bool = False) -> Outputs:
        """Run a model until consumers have run, and record their outputs or their inputs."""
        runs = ShortRuns(model, sum(len(self._norms[name]) for name in names))
        with recording(model, names, inputs=inputs, then=runs.seen) as found:
            runs(images)
        return found

    def _with_folded(self, model: nn.Module, output: Tensor, norm: str) -> Tensor:
        """Add what a BatchNorm has taken over from removed channels to the output it reads."""
        now, before = (owner.get_submodule(norm) for owner in (model, self.original(model)))
        if not norm or now.running_mean is None:
            return output
        offset = before.running_mean - now.running_mean
        return output + offset.view(-1, *[1] * (output.dim() - 2))

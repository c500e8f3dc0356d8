# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning one channel unit after the other, in the order in which the model computes them."""
import collections.abc
import hashlib
import json
import math
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.datasets.calibration import ImagesOf
from mmgcp.errors import PruningError
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.compensation.compensator import Compensator
from mmgcp.pruning.compensation.folding import Values
from mmgcp.pruning.layerwise import LayerwiseCriterion
from mmgcp.pruning.masking import channels_off
from mmgcp.pruning.plan import PruningPlan
from mmgcp.pruning.planner import Planner, score_units
from mmgcp.pruning.units import ChannelUnit, LayerGroup
from mmgcp.utils.checkpoint import read_checkpoint
from mmgcp.utils.cli import replacing

# Trains a model in place after so many units, with the removed channels off
Finetune = Callable[[nn.Module, int], None]


def drop_skipped(model: nn.Module, units: Sequence[ChannelUnit],
                 criterion: LayerwiseCriterion, skipped: Dict[str, str]) -> List[ChannelUnit]:
    """Return the units that a criterion prunes.

    Args:
        model (nn.Module): The model.
        units (Sequence[ChannelUnit]): All units.
        criterion (LayerwiseCriterion): The criterion.
        skipped (dict[str, str]): Gets the layers of the other units, with the reason.

    Returns:
        list[ChannelUnit]: The units.
    """
    kept = []
    for unit in units:
        reason = criterion.skips(model, unit)
        if reason is None:
            kept.append(unit)
        else:
            skipped.update((item.module, reason) for item in unit.side('out'))
    return kept


def order_units(model: nn.Module, units: Sequence[ChannelUnit],
               shape: Sequence[int]) -> List[ChannelUnit]:
    """Order units by when the model first computes a layer of theirs.

    Args:
        model (nn.Module): The model.
        units (Sequence[ChannelUnit]): The units.
        shape (Sequence[int]): Shape (C, H, W) of an image in pixels that the model runs on.

    Returns:
        list[ChannelUnit]: The units; those whose layers never run come last.
    """
    layers = {item.module: find_layer(model, item.module)
              for unit in units for item in unit.side('out')}
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, WEIGHT_TYPES)}
    first: Dict[str, int] = {}
    for number, (name, _, _) in enumerate(record_shapes(model, layers, shape)):
        first.setdefault(name, number)
    return sorted(units, key=lambda unit: min(
        first.get(item.module, math.inf) for item in unit.side('out')))


def choose_lowest(planner: Planner, model: nn.Module, unit: ChannelUnit, scores: Tensor,
                  allocated: Tensor) -> Tensor:
    """Choose the channels of a unit that have the lowest scores, as many as were allocated.

    Args:
        planner (Planner): Its limits hold for the choice, too.
        model (nn.Module): The model.
        unit (ChannelUnit): The unit, of size C.
        scores (Tensor): Scores (C, ); channels with NaN stay.
        allocated (Tensor): Channels (K, ) of another choice that keeps to the limits: equally
            many are chosen, equally many of each block.

    Returns:
        Tensor: Ascending indices (K, ). There are fewer only where whole units or the limits
        of layers that have only some of the channels do not let K of them go.
    """
    if scores.shape != (unit.size, ):
        raise PruningError(f'the unit {unit.name!r} has {unit.size} channels, but got scores '
                           f'of shape {tuple(scores.shape)}')
    members = [item.module for item in unit.side('out')
               if isinstance(find_layer(model, item.module), nn.Module)]
    group = LayerGroup('lowest', tuple(members))
    (scored, ) = score_units(model, [unit], lambda *_: {unit.name: scores.detach().cpu()},
                         [group], {})
    row, others = scored.scores[unit.name], unit.mask(allocated)
    conv_groups = torch.zeros(unit.size) if unit.conv_groups is None else unit.conv_groups
    places = torch.zeros_like(row)  # in the order of the block, beginning with what stays
    for block in conv_groups.unique():
        members = (conv_groups == block).nonzero().flatten()
        order = members[row[members].argsort(stable=True)]
        places[order] = torch.arange(len(order)).to(row) - int(others[members].sum())
    chosen = torch.zeros(0, dtype=torch.long)
    for more in range(unit.size):
        item = replace(scored, scores={unit.name: (places - more).masked_fill(
            row.isnan(), float('nan'))})
        found = replace(planner, scored=[item]).choose({'lowest': -0.5}).get(unit.name, chosen)
        if len(found) > len(allocated):
            break
        chosen = found
        if len(found) == len(allocated):
            break
    return chosen


def repeatable(iterable: Optional[Iterable]) -> Optional[Iterable]:
    """Make a list of what can be gone through only once."""
    return list(iterable) if isinstance(iterable, collections.abc.Iterator) else iterable


def settings_of(finetune: Optional[Finetune]) -> Union[None, bool, dict]:
    """What is known of a fine-tuning: its settings, True for another one, None for none."""
    return None if finetune is None else getattr(finetune, 'settings', True)


def digest_request(plan: PruningPlan, batches: Iterable[Batch], model: nn.Module) -> str:
    """Return a number in hexadecimals for a request.

    Args:
        plan (PruningPlan): The plan of the allocation, with all options.
        batches (Iterable[Batch]): Training batches, of which only the number counts.
        model (nn.Module): The model.

    Returns:
        str: The number, another one for other options, allocations or weights.
    """
    number = len(batches) if isinstance(batches, collections.abc.Sized) else None
    digest = hashlib.sha256(
        json.dumps([asdict(plan), number], sort_keys=True, default=repr).encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Unfinished:
    """The file that pruning goes on from after an interruption.

    Args:
        path (str | Path, optional): The file; None for none.
        digest (str): Of the request; a file of another one does not count.
    """

    def __init__(self, path: Union[str, Path, None], digest: str):
        self._path = None if path is None else Path(path)
        self._digest = digest

    def load(self) -> Optional[dict]:
        """Return what was saved last for this request, or None.

        Raises:
            UserError: The file cannot be read.
        """
        if self._path is None or not self._path.exists():
            return None
        state = read_checkpoint(str(self._path))
        return state if state.get('digest') == self._digest else None

    def save(self, **state) -> None:
        """Save a state in place of the last one; the folder is made if there is none."""
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as (temporary, ):
                torch.save(dict(state, digest=self._digest), temporary)


@dataclass
class LayerByLayer:
    """Prunes one unit after the other.

    Attributes:
        model (nn.Module): The model. Its weights are adapted in place; the channels are off
            meanwhile, and removed by nobody.
        criterion (LayerwiseCriterion): Chooses channels and adapts weights.
        planner (Planner): Its limits hold for each unit.
        compensator (Compensator): Folds what the channels of a unit emit before they go. At the
            end it adapts the BatchNorms to the model as it was before the first unit, unless
            there is fine-tuning, which changes them for the better.
        batches (Iterable[Batch]): Training batches.
        finetune (Callable, optional): Called with the model and the number of finished units
            after each unit.
        progress (Callable): Called with a stage, the steps done in it, and all its steps.
    """
    model: nn.Module
    criterion: LayerwiseCriterion
    planner: Planner
    compensator: Compensator
    batches: Iterable[Batch]
    finetune: Optional[Finetune]
    progress: Callable[[str, int, int], None]

    def run(self, units: Sequence[ChannelUnit], allocated: Dict[str, Tensor],
            unfinished: Unfinished) -> Tuple[Dict[str, Tensor], List[str]]:
        """Prune units.

        Args:
            units (Sequence[ChannelUnit]): The units, in order.
            allocated (dict[str, Tensor]): As many channels as each unit loses, by its name.
            unfinished (Unfinished): Where to save the state after each unit, and to go on from.

        Returns:
            tuple: The removed channels by name of the unit, and the layers that could not
            absorb what removed channels emit.
        """
        removed: Dict[str, Tensor] = {}
        uncompensated: List[str] = []
        units = [unit for unit in units if unit.name in allocated]
        with ExitStack() as off:
            state = unfinished.load()
            if state is None:
                self.criterion.begin(self.model, units, self.batches, self.progress)
                reference = self._reference()
            else:
                reference = self._reference()
                if reference is not None:
                    reference.load_state_dict(state['reference'])
                self.model.load_state_dict(state['model'])
                self.criterion.load_state_dict(state['criterion'])
                removed, uncompensated = state['removed'], state['uncompensated']
                self.progress('resuming', len(removed), len(units))
                off.enter_context(channels_off(self.model, units, removed))
            for number, unit in enumerate(units):
                if unit.name in removed:
                    continue
                self.progress('pruning layers', number, len(units))
                uncompensated += self._prune(unit, allocated[unit.name], removed, off)
                if self.finetune is not None:
                    with undisturbed(self.model):
                        self.finetune(self.model, number + 1)
                unfinished.save(model=self.model.state_dict(), removed=removed,
                                uncompensated=uncompensated,
                                criterion=self.criterion.state_dict(),
                                reference=reference and reference.state_dict())
            self.progress('pruning layers', len(units), len(units))
        self.compensator.adapt(removed, reference)
        return ({name: channels for name, channels in removed.items() if len(channels)},
                list(dict.fromkeys(uncompensated)))

    def _reference(self) -> Optional[nn.Module]:
        return None if self.finetune is not None else self.compensator.reference()

    def _prune(self, unit: ChannelUnit, allocated: Tensor, removed: Dict[str, Tensor],
               off: ExitStack) -> List[str]:
        """Switch channels of a unit off, add them to the removed ones, and adapt the weights."""
        scores = self.criterion.score(self.model, unit, self.batches)
        chosen = choose_lowest(self.planner, self.model, unit, scores, allocated)
        removed[unit.name] = chosen
        if not len(chosen):
            return []
        uncompensated = self.compensator.fold(
            {unit.name: chosen}, self._known_means(unit, chosen))
        off.enter_context(channels_off(self.model, [unit], removed))
        self.criterion.update(self.model, unit, chosen, self.batches)
        return uncompensated

    def _known_means(self, unit: ChannelUnit, chosen: Tensor) -> Optional[Values]:
        """What chosen channels emit on average, if the scores have measured it on the images."""
        images, means = self.compensator.images, self.criterion.mean_inputs(unit)
        if means is None or not (isinstance(images, ImagesOf) and images.batches is self.batches):
            return None
        mask = unit.mask(chosen)
        known = {item.module: {norms: mean[mask[item.unit_index].to(mean.device)]
                               for norms, mean in means[item.module].items()}
                 for item in unit.side('in') if item.module in means}
        return {name: values for name, values in known.items()
                if all(map(len, values.values()))}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let somebody train a model: only its weights and statistics are others afterwards.

    Modes, gradients, what needs gradients, and the device are restored.

    Args:
        model (nn.Module): The model.
    """
    modes = {module: module.training for module in model.modules()}
    params = [(param, param.requires_grad, param.grad) for param in model.parameters()]
    device = next(model.parameters()).device
    for param, _, _ in params:
        param.grad = None
    try:
        yield
    finally:
        model.to(device)
        for module, mode in modes.items():
            module.training = mode
        for param, needs_grad, grad in params:
            param.requires_grad_(needs_grad)
            param.grad = grad

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What blocks are worth: the loss without them, or its first-order estimate."""
import math
from functools import partial
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import record_convs
from mmgcp.errors import PruningError
from mmgcp.nn.distributed import numbered, sum_by_name
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.temporarily import requiring_grad
from mmgcp.nn.training_loss import Batch, detection_loss, loss_mode, seed_batch
from mmgcp.pruning.scores.base import Progress
from mmgcp.pruning.scores.channel_gates import scoring_batches

from .removal import AbsentBlocks, blocks_off

# (model, blocks, batches, progress) -> scores by name
BlockScores = Callable[[nn.Module, AbsentBlocks, Iterable[Batch], Progress], Dict[str, float]]
Without = Callable[[str], nn.Module]


def mean_loss(model: nn.Module, batches: Iterable[Batch], progress: Progress) -> float:
    """Return the mean training loss of a detector over the batches of all ranks.

    Raises a PruningError if there are none, or the loss is not finite.
    """
    return _mean_losses(model, {'': {}}, batches, progress)['']


def loss_changes(model: nn.Module, absent: AbsentBlocks, batches: Iterable[Batch],
                 progress: Progress) -> Dict[str, float]:
    """Measure by how much the training loss rises without each block alone.

    It is the mean over the batches of all ranks, in the mode of
    :func:`mmgcp.nn.training_loss.loss_mode`.

    Args:
        model (nn.Module): The detector, which is not changed.
        absent (dict[str, str | None]): The blocks; see :func:`remove_blocks`.
        batches (Iterable[Batch]): Training data of this rank.
        progress (Callable): See :meth:`mmgcp.pruning.Criterion.prepare`.

    Returns:
        dict[str, float]: The changes by name of the block; below 0 where the loss falls.

    Raises:
        PruningError: There are no batches, or a loss is not finite.
    """
    cases = {name: {name: scale} for name, scale in absent.items()}
    losses = _mean_losses(model, {'': {}, **cases}, batches, progress)
    return {name: losses[name] - losses[''] for name in cases}


def _mean_losses(model: nn.Module, cases: Dict[str, AbsentBlocks], batches: Iterable[Batch],
                 progress: Progress) -> Dict[str, float]:
    """Return the mean loss without some blocks, for each of several cases."""
    losses, number = dict.fromkeys(cases, 0.), {'': 0}
    with loss_mode(model), torch.no_grad():
        for index, batch in numbered(scoring_batches(batches, progress)):
            number[''] += 1
            for name, absent in cases.items():
                seed_batch(model, index)
                with blocks_off(model, absent):
                    losses[name] += float(detection_loss(model, batch))
    losses, number = sum_by_name(losses), sum_by_name(number)['']
    for name, loss in losses.items():
        if not math.isfinite(loss):
            without = f' without {", ".join(cases[name])}' if cases[name] else ''
            raise PruningError(f'the loss on the training data{without} is {loss}; are the weights '
                               'those of a trained detector?')
    return {name: loss / number for name, loss in losses.items()}


def taylor_scores(model: nn.Module, absent: AbsentBlocks, batches: Iterable[Batch],
                  progress: Progress) -> Dict[str, float]:
    """Estimate to first order by how much the training loss changes without each block.

    With a gate z = 1 that multiplies what a block adds to its shortcut, setting z = 0 changes the
    loss by -dL/dz to first order, as in `arXiv 1906.10771 <https://arxiv.org/abs/1906.10771>`_
    for channels. dL/dz is the sum over all places of the gradient at the output of the block,
    times the difference of this output and what the shortcut emits. The score is the mean
    of the absolute dL/dz over the batches of all ranks, each of which is run once forwards and
    backwards.

    Arguments, result and errors are those of :func:`loss_changes`; scores are not below 0.
    """
    scores, number = dict.fromkeys(absent, 0.), {'': 0}
    with loss_mode(model), requiring_grad(model, model.parameters()):
        for index, batch in numbered(scoring_batches(batches, progress)):
            number[''] += 1
            seed_batch(model, index)
            for name, value in _gate_gradients(model, absent, batch).items():
                scores[name] += abs(value)
    scores, number = sum_by_name(scores), sum_by_name(number)['']
    if not all(map(math.isfinite, scores.values())):
        raise PruningError('the loss on the training data has no finite derivatives; are the '
                           'weights those of a trained detector?')
    return {name: score / number for name, score in scores.items()}


def _gate_gradients(model: nn.Module, absent: AbsentBlocks, batch: Batch) -> Dict[str, float]:
    """Return the derivatives of the loss of a batch with respect to gates of blocks."""
    gates: Dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def multiply(name: str, scale: Optional[str], inputs: Tensor, output: Tensor) -> Tensor:
        shortcut = inputs if scale is None else modules[name]._parameters[scale] * inputs
        gates[name] = output.new_ones(()).requires_grad_()
        return shortcut + gates[name] * (output - shortcut)

    with on_outputs(model, {name: partial(multiply, name, scale)
                            for name, scale in absent.items()}):
        loss = detection_loss(model, batch)
    if not gates or not loss.requires_grad:
        return {}
    values = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    return {name: 0. if value is None else float(value) for name, value in zip(gates, values)}


def compensated_changes(model: nn.Module, names: Sequence[str], batches: Iterable[Batch],
                        without: Without, progress: Progress) -> Dict[str, float]:
    """Measure by how much the training loss rises without each block alone, once made up for.

    Without compensation nearly every block seems indispensable; what counts is what the
    layers behind it cannot take over.

    Args:
        model (nn.Module): The detector, which is not changed.
        names (Sequence[str]): The blocks.
        batches (Iterable[Batch]): Training data of this rank, gone through again and again.
        without (Callable): Returns the detector without a block, compensated.
        progress (Callable): See :meth:`mmgcp.pruning.Criterion.prepare`.

    Returns:
        dict[str, float]: The changes by name of the block; below 0 where the loss falls.

    Raises:
        PruningError: There are no batches, or a loss is not finite.
    """
    before = mean_loss(model, batches, lambda *_: None)
    changes = {}
    for number, name in enumerate(names):
        progress('trying blocks', number, len(names))
        changes[name] = mean_loss(without(name), batches, lambda *_: None) - before
    progress('trying blocks', len(names), len(names))
    return changes


# Those that score all that are left anew, each time that a block has been chosen
GREEDY: Dict[str, BlockScores] = {'loss-change': loss_changes, 'taylor': taylor_scores}
COMPENSATED = 'compensated-loss'
BLOCK_CRITERIA = (COMPENSATED, *GREEDY)


def block_costs(model: nn.Module, names: Iterable[str],
                input_shape: Sequence[int]) -> Dict[str, Tuple[int, int]]:
    """Count the parameters, and the MACs for an image (C, H, W), of blocks by their names."""
    convs = record_convs(model, input_shape)
    return {name: (sum(param.numel() for param in model.get_submodule(name).parameters()),
                   sum(conv.macs for layer, conv in convs.items()
                       if layer.startswith(f'{name}.'))) for name in names}


def order_blocks(model: nn.Module, absent: AbsentBlocks, number: int, criterion: str,
                 batches: Iterable[Batch], input_shape: Sequence[int],
                 without: Without, progress: Progress) -> List[Tuple[str, float]]:
    """Choose blocks one after the other: next is what costs least of the loss for its MACs.

    Args:
        model (nn.Module): The detector, which is not changed.
        absent (dict[str, str | None]): The blocks to choose from; see :func:`remove_blocks`.
        number (int): How many to choose.
        criterion (str): One of ``BLOCK_CRITERIA``. Those in ``GREEDY`` score all that are left
            each time, without those that have been chosen; ``COMPENSATED`` scores once.
        batches (Iterable[Batch]): Training data of this rank, gone through again and again.
        input_shape (Sequence[int]): Shape (C, H, W) of an image in pixels, for the MACs.
        without (Callable): Returns the detector without a block, compensated.
        progress (Callable): See :meth:`mmgcp.pruning.Criterion.prepare`.

    Returns:
        list[tuple[str, float]]: The blocks in the order of choice, each with its score.
    """
    if not number:
        return []
    costs = block_costs(model, absent, input_shape)
    scores: Dict[str, float] = {}
    if criterion == COMPENSATED:
        scores = compensated_changes(model, list(absent), batches, without, progress)
    chosen: Dict[str, float] = {}
    for _ in range(number):
        left = {name: scale for name, scale in absent.items() if name not in chosen}
        if criterion in GREEDY:
            with blocks_off(model, {name: absent[name] for name in chosen}):
                scores = GREEDY[criterion](model, left, batches, progress)
        best = min(left, key=lambda name: (max(scores[name], 0) / max(costs[name][1], 1),
                                           scores[name]))
        chosen[best] = scores[best]
    return list(chosen.items())

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""ThiNet: remove the channels without which the next layers can be reconstructed best."""
import zlib
from functools import partial
from typing import Dict, Iterable, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import numbered, sum_over_ranks, total_over_ranks
from mmgcp.nn.forward import ShortRuns
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.layers import WEIGHT_TYPES, find_layer, is_depthwise, num_channels, spread_inputs
from mmgcp.nn.temporarily import eval_mode
from mmgcp.nn.training_loss import Batch
from mmgcp.pruning.compensation.folding import fold_constants
from mmgcp.pruning.compensation.statistics import Norms, measure_inputs
from mmgcp.pruning.surgery import gather_channels
from mmgcp.pruning.units import ChannelSlice, ChannelUnit
from mmgcp.registry import TASK_UTILS
from mmgcp.utils.checks import BOOLEAN, SEED, checked, number_in

from .base import LayerwiseCriterion, Means
from .consumers import find_consumers
from .contributions import contributions, draw_entries

# Eigenvalues of a Gram matrix below the largest one times this are noise
LEAST_EIGENVALUE = 1e-8


@TASK_UTILS.register_module()
class ThiNet(LayerwiseCriterion):
    """Removes the channels that their consumers miss least.

    `ThiNet, arXiv 1707.06342 <https://arxiv.org/abs/1707.06342>`_. An entry of a layer's output,
    before normalisation and activation and without the bias, is the sum of the contributions x_c
    of the channels c that the layer reads (equation 4). The contributions to random entries of a
    unit's consumers are recorded. Channels are removed one by one, each time the one with which
    the squared sum of all removed contributions, over all entries, grows least (equation 6,
    algorithm 1); the score of a channel is its rank in this order. Norm groups are removed as a
    whole. The kernels of the channels that stay are multiplied by one factor per channel, the
    least squares solution for the sum of all contributions (equation 7).

    Beyond the paper, a unit may have several consumers, as at shortcuts and concatenations:
    entries of all of them count, and a channel has the same factor in each. Where
    :func:`mmgcp.pruning.prune` folds the means of removed channels into the consumers, which is
    the default, the contributions of these means do not count, and what the factors change in
    them is folded, too: channels and factors are chosen for what a constant cannot replace. With
    ``prune(compensate=False)`` the method is that of the paper.

    Args:
        positions (int): Entries per image and consumer. The paper has 10, for 10 images of each of
            ImageNet's 1000 classes; with fewer images more are needed, in total several times
            as many entries as a unit has channels. Defaults to 100.
        rescale (bool): Multiply the kernels by the factors. Defaults to True.
        skip_shortcuts (bool): Do not prune units that several layers with weights compute
            together, by a sum or a product, like the paper for the last convolution of each
            block of a ResNet. Defaults to False.
        seed (int): Seed of the random entries. Defaults to 0.
        allocation_criterion (dict, optional): See :class:`LayerwiseCriterion`.

    Raises:
        PruningError: ``positions`` is not positive.
    """

    @checked(PruningError, positions=number_in(1, 10**6, integer=True), rescale=BOOLEAN,
             skip_shortcuts=BOOLEAN, seed=SEED)
    def __init__(self, positions: int = 100, rescale: bool = True, skip_shortcuts: bool = False,
                 seed: int = 0, allocation_criterion: Optional[dict] = None):
        super().__init__(allocation_criterion)
        self.positions = positions
        self.rescale = rescale
        self.skip_shortcuts = skip_shortcuts
        self.seed = seed
        self._off: Dict[str, Tensor] = {}  # removed output channels by layer
        # Of the unit that was scored last, by its name: Gram matrix and mean inputs, if folded
        self._sampled: Dict[str, Tuple[Tensor, Optional[Means]]] = {}

    def skips(self, model: nn.Module, unit: ChannelUnit) -> Optional[str]:
        """Refuse units that several layers compute together, if ``skip_shortcuts``."""
        if not self.skip_shortcuts:
            return None
        producers = torch.zeros(unit.size, dtype=torch.long)
        for item in unit.side('out'):
            layer = find_layer(model, item.module)
            if isinstance(layer, WEIGHT_TYPES) and not is_depthwise(layer):
                producers[item.unit_index.unique()] += 1
        if bool((producers > 1).any()):
            return 'ThiNet leaves channels alone that several layers compute together'
        return None

    def score(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch]) -> Tensor:
        """Return the ranks (C, ) of a unit's channels in the order of removal, from zero."""
        means, absorbed = None, {}
        if self.folded and unit.side('in'):
            measured = measure_inputs(
                model, {item.module: item.channels for item in unit.side('in')},
                (batch.images for batch in batches))
            means = {name: {norms: statistics.mean for norms, statistics in entries.items()}
                     for name, entries in measured.items()}
            # a layer without BatchNorm and bias cannot absorb a constant
            absorbed = {name: entries for name, entries in means.items()
                        if all(entries) or find_layer(model, name).bias is not None}
        gram = self.sample(model, unit, batches, absorbed)
        self._sampled = {unit.name: (gram, means)}
        return removal_ranks(gram, unit.norm_groups)

    def mean_inputs(self, unit: ChannelUnit) -> Optional[Means]:
        """Return the mean inputs that :meth:`score` has measured, if they are folded."""
        return self._sampled.get(unit.name, (None, None))[1]

    def update(self, model: nn.Module, unit: ChannelUnit, removed: Tensor,
               batches: Iterable[Batch]) -> None:
        """Multiply the kernels of the channels that stay by the least squares factors.

        Raises:
            PruningError: The unit has not been scored.
        """
        if self.rescale:
            if unit.name not in self._sampled:
                raise PruningError(f'the unit {unit.name!r} has to be scored before its update')
            gram, means = self._sampled[unit.name]
            factors = least_squares_factors(gram, removed)
            for item in unit.side('in'):
                _scale_inputs(model.get_submodule(item.module), item, factors,
                              (means or {}).get(item.module, {}))
        for (name, side), channels in gather_channels([unit], {unit.name: removed}).items():
            if side == 'out':
                self._off[name] = torch.cat((self._off.get(name, channels[:0]), channels))
        self._sampled = {}

    def state_dict(self) -> dict:
        """Return the removed output channels of each layer."""
        return dict(off=self._off)

    def load_state_dict(self, state: dict) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._off = state['off']

    @torch.no_grad()
    def sample(self, model: nn.Module, unit: ChannelUnit, batches: Iterable[Batch],
               means: Optional[Means] = None) -> Tensor:
        """Return the Gram matrix (C, C) of the channels' contributions to random entries.

        It is in double precision, on the CPU, and over the batches of all ranks. The contributions
        of mean inputs, by consumer, are subtracted, as they are folded. The memory does not grow
        with the number of batches.
        """
        like = next(model.parameters())
        gram = torch.zeros(unit.size, unit.size, dtype=torch.double, device=like.device)
        generator = torch.Generator()
        runs, count = ShortRuns(model), 0

        def look(name, slices, inputs, output):
            layer, folded = model.get_submodule(name), list((means or {}).get(name, {}).values())
            # the mean over the BatchNorms that read the consumer
            mean = torch.stack(folded).mean(0).to(like.device) if folded else None
            for item in slices:
                entries = draw_entries(layer, output, self.positions, self._off.get(name),
                                       generator)
                found = contributions(layer, inputs, item, unit.size, entries, mean).double()
                gram.addmm_(found.t(), found)
            runs.seen()

        looks = {name: partial(look, name, slices)
                 for name, slices in find_consumers(model, unit).items()}
        with on_outputs(model, looks), eval_mode(model):
            for number, batch in numbered(batches):
                # positions depend on the number of the batch alone, whatever rank has it
                generator.manual_seed(zlib.crc32(f'{self.seed} {number}'.encode()))
                runs(batch.images.to(like))
                count += 1
        if not total_over_ranks(count):
            raise PruningError('there are no images to sample')
        return sum_over_ranks(gram).cpu()


@torch.no_grad()
def _scale_inputs(layer: nn.Module, item: ChannelSlice, factors: Tensor,
                  means: Dict[Norms, Tensor]) -> None:
    """Multiply the kernels of a unit's channels by factors (C, ) and fold what means lose.

    Inputs that belong to several channels of the unit get the mean of their factors.
    """
    size = num_channels(layer, 'in')
    counts = torch.zeros(size).index_add(0, item.channels, torch.ones(len(item.channels)))
    sums = torch.zeros(size, dtype=factors.dtype).index_add(
        0, item.channels, factors[item.unit_index] - 1)
    scales = 1 + sums / counts.clamp(min=1)
    lost = {norms: (1 - scales[item.channels]).to(mean) * mean for norms, mean in means.items()}
    fold_constants(layer, item.channels, lost, False)
    layer.weight.mul_(spread_inputs(layer, scales).to(layer.weight))


def removal_ranks(gram: Tensor, norm_groups: Optional[Tensor] = None) -> Tensor:
    """Return the ranks (C, ) of channels in the order of removal of ThiNet's algorithm 1.

    Ranks start from zero. Channels with the same index (C, ) of the norm group are removed
    together and have the same rank.
    """
    numbers = torch.arange(len(gram)) if norm_groups is None else norm_groups
    members = F.one_hot(numbers).to(gram)
    gram = members.t() @ gram @ members
    growth = gram.diagonal().clone()  # of the squared sum, if this one is removed next
    ranks = torch.zeros(len(gram))
    for rank in range(len(gram)):
        chosen = int(growth.argmin())
        ranks[chosen] = rank
        growth += 2 * gram[chosen]
        growth[chosen] = float('inf')
    return ranks[numbers]


def least_squares_factors(gram: Tensor, removed: Tensor) -> Tensor:
    """Return the factors (C, ) with which the other channels replace the removed ones (K, ) best.

    With contributions X, they minimise ``||X @ 1 - X_kept @ w||`` (equation 7 of ThiNet). The
    system is solved for w - 1 and only in directions in which the samples vary (whose eigenvalue
    is not noise): in the others, w remains 1. Removed channels have the factor 1.
    """
    gone = torch.zeros(len(gram), dtype=torch.bool)
    gone[removed] = True
    factors = torch.ones(len(gram), dtype=torch.double)
    values, vectors = torch.linalg.eigh(gram.double()[~gone][:, ~gone])
    stable = values > LEAST_EIGENVALUE * values[-1].clamp(min=0)
    vectors = vectors[:, stable] / values[stable].sqrt()
    factors[~gone] += vectors @ (vectors.t() @ gram.double()[~gone][:, gone].sum(1))
    return factors

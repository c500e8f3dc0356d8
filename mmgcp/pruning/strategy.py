# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What is to be pruned, how that is decided, and by which strategy."""
from dataclasses import dataclass, field
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Type

import torch.nn as nn
from torch import Tensor

from mmgcp.analysis import record_convs
from mmgcp.errors import PruningError
from mmgcp.nn.forward import working_shape

from .compensation import Compensator
from .cost import CostModel
from .graph import find_units
from .options import PruneOptions
from .plan import PruningPlan
from .scores import Criterion
from .units import ChannelUnit


@dataclass(frozen=True)
class PruningTask:
    """A detector that has been traced, and what is wanted."""
    model: nn.Module
    options: PruneOptions
    units: List[ChannelUnit]
    skipped: Dict[str, str]  # layers that are left alone, with the reason; strategies add some
    cost: CostModel
    shape: Sequence[int]  # (C, H, W) of a small image that the detector runs on

    def compensator(self, images: Optional[Iterable[Tensor]] = None) -> Compensator:
        """Make the compensator for batches (N, C, H, W), else for the calibration images."""
        images = self.options.calibration if images is None else images
        return Compensator(self.model, self.units, self.options.compensate, images, self.shape)

    def check_data(self, criterion: Criterion) -> None:
        """Raise a PruningError if a criterion needs training data and there are none."""
        if criterion.needs and self.options.batches is None:
            raise PruningError(f'the criterion {type(criterion).__name__} needs training data, but '
                               'there are none: give batches (--calib-batches of tools/prune.py)')


@dataclass
class Decision:
    """What a strategy has decided."""
    plan: PruningPlan
    scores: Dict[str, Tensor] = field(default_factory=dict)  # (K, ) by layer group, for a report
    # Layers that could not absorb everything, None if compensation has yet to be done
    uncompensated: Optional[List[str]] = None


Strategy = Callable[[PruningTask, Criterion], Decision]
STRATEGIES: Dict[Type[Criterion], Strategy] = {}


def register_strategy(kind: Type[Criterion]) -> Callable[[Strategy], Strategy]:
    """Register how to prune by criteria of a kind, its subclasses included."""
    def register(strategy: Strategy) -> Strategy:
        STRATEGIES[kind] = strategy
        return strategy
    return register


def strategy_of(criterion: Criterion) -> Strategy:
    """Return the strategy for a criterion, that of its nearest kind."""
    return next(STRATEGIES[kind] for kind in type(criterion).__mro__ if kind in STRATEGIES)


def trace(model: nn.Module, options: PruneOptions) -> PruningTask:
    """Find the channel units of a detector and what they cost."""
    options.progress('tracing', 0, 2)
    shape = working_shape(model, options.input_shape)
    units, skipped = find_units(model, shape)
    options.progress('tracing', 1, 2)
    cost = CostModel(model, record_convs(model, options.input_shape), units)
    options.progress('tracing', 2, 2)
    return PruningTask(model, options, units, skipped, cost, shape)

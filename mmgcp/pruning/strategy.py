# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What pruning is about, how it is decided, and by which strategy."""
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
    """A model that has been traced, and what is wanted.

    Attributes:
        model (nn.Module): The detector.
        options (PruneOptions): The options.
        units (List[ChannelUnit]): Its channel units.
        skipped (Dict[str, str]): Layers that are left alone, with the reason; strategies add
            those that they leave alone.
        cost (CostModel): Gives the parameters and MACs that remain.
        shape (Sequence[int]): Shape (C, H, W) of a small image that the detector runs on.
    """
    model: nn.Module
    options: PruneOptions
    units: List[ChannelUnit]
    skipped: Dict[str, str]
    cost: CostModel
    shape: Sequence[int]

    def compensator(self, images: Optional[Iterable[Tensor]] = None) -> Compensator:
        """Make what makes up for removed channels.

        Args:
            images (Iterable[Tensor], optional): Batches (N, C, H, W) to measure on. Defaults to
                the calibration images of the options.
        """
        images = self.options.calibration if images is None else images
        return Compensator(self.model, self.units, self.options.compensate, images, self.shape)

    def check_data(self, criterion: Criterion) -> None:
        """Raise a PruningError if a criterion needs training data and there are none."""
        if criterion.needs and self.options.batches is None:
            raise PruningError(f'the criterion {type(criterion).__name__} needs training data, but '
                               'there are none: give batches (--calib-batches of tools/prune.py)')


@dataclass
class Decision:
    """What a strategy has decided.

    Attributes:
        plan (PruningPlan): What is removed.
        scores (Dict[str, Tensor]): All scores (K, ) by layer group, for a report; may be empty.
        uncompensated (List[str], optional): If removed channels have been made up for already,
            the layers that could not absorb all of it; None if that has yet to be done.
    """
    plan: PruningPlan
    scores: Dict[str, Tensor] = field(default_factory=dict)
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
    """Find the strategy for a criterion, that of its nearest kind."""
    return next(STRATEGIES[kind] for kind in type(criterion).__mro__ if kind in STRATEGIES)


def trace(model: nn.Module, options: PruneOptions) -> PruningTask:
    """Find the channel units of a model and what they cost.

    Args:
        model (nn.Module): A detector that understands ``model(x, mode='tensor')``, or a
            two-stage detector of MMDetection.
        options (PruneOptions): The options.

    Returns:
        PruningTask: The task.

    Raises:
        PruningError: The model cannot be traced.
    """
    options.progress('tracing', 0, 2)
    shape = working_shape(model, options.input_shape)
    units, skipped = find_units(model, shape)
    options.progress('tracing', 1, 2)
    cost = CostModel(model, record_convs(model, options.input_shape), units)
    options.progress('tracing', 2, 2)
    return PruningTask(model, options, units, skipped, cost, shape)

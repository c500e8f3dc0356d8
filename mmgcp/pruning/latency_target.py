# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruning to a time on this machine: a cost like MACs, and a measurement that corrects it.

What a budget is spent by is the sum of what layers take in a table
(:mod:`mmgcp.pruning.latency_table`), as a share of that of the original. What lies between the
layers (activations, concatenations) is taken to shrink as they do. How far that is wrong is
measured on the whole pruned network, and the share that is asked for is corrected.
"""
import copy
import statistics
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch.nn as nn
from mmengine.dist import is_main_process
from torch import Tensor

from mmgcp.deployment.timing import check_runtime, cpu_name, make_run, speedups, take_turns
from mmgcp.errors import PruningError, UserError
from mmgcp.nn.distributed import from_first_rank

from .budget import Budget
from .cost import CostModel
from .latency_table import LatencyTable, LayerKind, fill_table, lacks, layer_kinds
from .options import BLOCK, PruneOptions
from .remaining import remaining_channels
from .select import Thresholds
from .surgery import remove_channels
from .units import ChannelUnit

TOLERANCE = 0.05  # of the target
ATTEMPTS = 5
ROUNDS = 15  # of measuring whole networks
Choice = Tuple[Thresholds, Dict[str, Tensor]]  # and the channels (K, ) they remove, by unit


class TimedCost(CostModel):
    """What channels take, in the place of what MACs they cost.

    Args:
        cost (CostModel): Knows parameters and MACs.
        kinds (dict[str, list[LayerKind]]): See :func:`mmgcp.pruning.latency_table.layer_kinds`.
        table (LatencyTable): The times of such layers.
    """
    quantities = ('parameters', 'time of all layers')

    def __init__(self, cost: CostModel, kinds: Dict[str, List[LayerKind]], table: LatencyTable):
        self.__dict__.update(cost.__dict__)
        self.kinds, self.table = kinds, table
        self.time = self._time(self.channels)
        if self.time <= 0:
            raise PruningError('the latency table says that no layer takes any time')

    def shares(self, removed: Dict[str, Tensor]) -> Tuple[float, float]:
        """Return the shares of the parameters and of the time that remain."""
        params = self(removed)[0] / self.whole[0]
        return params, self._time(self.channels_left(removed)) / self.time

    def costs(self, unit: ChannelUnit) -> Tuple[float, float]:
        """Return what a channel of a unit costs, as shares of the parameters and the time.

        It is the mean over half of the channels, as a single one may cost nothing.
        """
        half = max(1, unit.size // 2)
        time = 0.
        for item in unit.slices:
            fewer = len(item.channels) * half // unit.size
            before = self.channels[item.module]
            if item.module in self.kinds and fewer:
                left = list(before)
                left[0 if item.side == 'in' else 1] -= fewer
                time += self._layer(item.module, before) - self._layer(item.module, left)
        return super().costs(unit)[0], max(time, 0.) / half / self.time

    def _time(self, channels: Dict[str, Sequence[int]]) -> float:
        return sum(self._layer(name, channels[name]) for name in self.kinds)

    def _layer(self, name: str, channels: Sequence[int]) -> float:
        return sum(self.table.time(kind.name, *channels) for kind in self.kinds[name])


@dataclass
class LatencyTarget:
    """A time that is wanted of a detector in a program, on this machine.

    Attributes:
        milliseconds (float): What is wanted for an image.
        runtime (str): The program.
        shape (Sequence[int]): Shape (C, H, W) of the image in pixels.
        original (float): What the original takes.
        cost (TimedCost): What channels take.
        run (Callable): Runs the original.
        verify (bool): Whether to measure the result, which tells nothing where the table is of
            another machine.
        whole (float, optional): What the original takes with the blocks that it has lost, if it
            has lost any.
    """
    milliseconds: float
    runtime: str
    shape: Sequence[int]
    original: float
    cost: TimedCost
    run: Optional[Callable[[], Any]]
    verify: bool = True
    whole: Optional[float] = None

    @property
    def share(self) -> float:
        """The share of the original's time that is wanted."""
        return self.milliseconds / self.original

    def beside(self, whole: nn.Module) -> 'LatencyTarget':
        """Return the target with the time of a detector that has the blocks, if it is measured."""
        if not self.verify:
            return self
        found = self._time(whole) if is_main_process() else None
        return replace(self, whole=from_first_rank(found))

    def meet(self, choose: Callable[[Budget], Choice], budget: Budget, model: nn.Module,
             units: Sequence[ChannelUnit], gone: Dict[str, Tensor]) -> Tuple[Choice, dict]:
        """Choose channels, measure the network without them, and correct until it is right.

        Args:
            choose (Callable): Chooses for a budget.
            budget (Budget): What is asked for first.
            model (nn.Module): The model, without channels ``gone``; it is not changed.
            units (Sequence[ChannelUnit]): Its units.
            gone (dict[str, Tensor]): Channels (K, ) of the original that it has lost, by unit.

        Returns:
            tuple: The choice that is nearest, and what was measured, for a report.

        Raises:
            PruningError: The first choice cannot be made.
        """
        tried: List[Tuple[float, Choice]] = []
        share = budget.flops
        for _ in range(ATTEMPTS):
            try:
                choice = choose(replace(budget, flops=share))
            except PruningError as error:
                if not tried:
                    raise PruningError(f'the target is {self.milliseconds:g} ms, and the detector '
                                       f'takes {self.original:.3g} ms: {error}') from error
                break  # corrected beyond what can be reached
            if not self.verify:
                return choice, self._record(None)
            found = self._measure(model, units, remaining_channels(choice[1], gone))
            tried.append((found, choice))
            if abs(found / self.milliseconds - 1) <= TOLERANCE:
                break
            share = min(1., share * self.milliseconds / found)
        found, choice = min(tried, key=lambda item: abs(item[0] / self.milliseconds - 1))
        record = self._record(found)
        if not record['met']:
            warnings.warn(f'the pruned detector takes {found:.3g} ms in {self.runtime}, and the '
                          f'target is {self.milliseconds:g} ms: that is the nearest that was found',
                          stacklevel=2)
        return choice, record

    def _measure(self, model: nn.Module, units: Sequence[ChannelUnit],
                 removed: Dict[str, Tensor]) -> float:
        """Return the milliseconds of a model without channels (K, ) of units, on the first rank."""
        if not is_main_process():
            return from_first_rank(None)
        pruned = copy.deepcopy(model)
        remove_channels(pruned, units, removed)
        return from_first_rank(self._time(pruned))

    def _time(self, model: nn.Module) -> float:
        """Return a model's milliseconds: the original's by the ratio of both, which take turns."""
        times = take_turns([self.run, make_run(model, self.shape, self.runtime)], ROUNDS)
        return self.original / speedups(times)[1]

    def _record(self, found: Optional[float]) -> dict:
        met = found is not None and abs(found / self.milliseconds - 1) <= TOLERANCE
        return dict(target=self.milliseconds, runtime=self.runtime,
                    before=self.whole or self.original, after=found, met=met,
                    machine=self.cost.table.machine)


def latency_target(model: nn.Module, cost: CostModel, options: PruneOptions) -> LatencyTarget:
    """Measure an original and its layers, as far as no table has them.

    Args:
        model (nn.Module): The detector.
        cost (CostModel): What its channels cost in parameters and MACs.
        options (PruneOptions): With ``target_latency``.

    Returns:
        LatencyTarget: What is to be met.

    Raises:
        PruningError: The program cannot run the detector, the table is of another program or
            lacks layers of another machine, or the original is as fast as that.
    """
    shape, run = options.input_shape, None
    kinds, found = layer_kinds(model, shape), None
    if is_main_process():
        table = _open_table(options.latency_table, options.runtime)
        if table.machine == cpu_name():
            run = _run_of_original(model, options)
            found = table, statistics.median(take_turns([run], ROUNDS)[0])
            multiple = BLOCK if options.round_to == 1 else options.round_to
            new = fill_table(table, model, kinds, multiple, options.progress)
            if new and options.latency_table is not None:
                table.save(options.latency_table)
        else:
            lacking = [kind.name for kind in lacks(table, model, kinds)]
            if lacking:
                raise PruningError(f'the latency table {options.latency_table} is of '
                                   f'{table.machine}, and it lacks {len(lacking)} kinds of layers '
                                   f'of this detector, such as {lacking[0]!r}: measure them there')
            found = table, None
    table, original = from_first_rank(found)
    cost = TimedCost(cost, kinds, table)
    if original is None:
        warnings.warn(f'the latency table was measured on {table.machine}, not here: the result is '
                      'not compared with the target', stacklevel=2)
        return _checked(LatencyTarget(options.target_latency, options.runtime, shape, cost.time,
                                      cost, None, verify=False), options)
    return _checked(LatencyTarget(options.target_latency, options.runtime, shape, original, cost,
                                  run), options)


def check_latency_request(options: PruneOptions) -> None:
    """Find out without a model what stands in the way of a ``target_latency``.

    Raises:
        PruningError: The table cannot be read or is of another program, or the program is not
            installed, which only matters where the table was measured.
    """
    if is_main_process() and _open_table(
            options.latency_table, options.runtime).machine == cpu_name():
        _check_program(options.runtime)


def _checked(target: LatencyTarget, options: PruneOptions) -> LatencyTarget:
    """Return a target, or raise a PruningError if there is nothing to do for it."""
    if target.share >= 1:
        state = 'without the removed blocks' if options.remove_blocks else 'as it is'
        raise PruningError(f'target_latency is {target.milliseconds:g} ms, but the detector takes '
                           f'{target.original:.3g} ms in {target.runtime} {state}')
    return target


def _run_of_original(model: nn.Module, options: PruneOptions) -> Callable[[], Any]:
    _check_program(options.runtime)
    try:
        return make_run(model, options.input_shape, options.runtime)
    except UserError as error:
        raise PruningError(f'target_latency cannot be measured: {error}') from error


def _check_program(runtime: str) -> None:
    try:
        check_runtime(runtime)
    except UserError as error:
        raise PruningError(f'target_latency cannot be measured: {error}') from error


def _open_table(path: Any, runtime: str) -> LatencyTable:
    """Read a table if there is one; PruningError if it is of another program."""
    if path is None or not Path(path).exists():
        if path is not None and not Path(path).parent.is_dir():
            raise PruningError(f'there is no folder {Path(path).parent} for the latency table')
        return LatencyTable(runtime)
    table = LatencyTable.load(path)
    if table.runtime != runtime:
        raise PruningError(f'the latency table {path} is for {table.runtime}, but runtime is '
                           f'{runtime}')
    return table

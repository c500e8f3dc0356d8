# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A table of what layers of all widths take in a program, measured, kept in a file, and read.

Each layer is measured by itself, with its real kernel, stride and map, at some numbers of input and
output channels that are multiples of what blocks have; between these it is interpolated.
"""
import json
import math
import statistics
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple, Union

import torch.nn as nn

from mmgcp.deployment.timing import cpu_name, layer_run, take_turns
from mmgcp.errors import PruningError
from mmgcp.nn.forward import record_shapes
from mmgcp.nn.layers import WEIGHT_TYPES, channel_counts, is_depthwise
from mmgcp.utils.cli import replacing
from mmgcp.utils.json_files import parse_json, read_text, shorten

FORMAT = 'mmgcp.latency_table'
POINTS = 5  # widths of a side that are measured, at most
RUNS = 9  # of each layer
Times = Dict[Tuple[int, int], float]  # milliseconds by input and output channels


@dataclass(frozen=True)
class LayerKind:
    """What the time of a layer depends on besides its channels.

    Attributes:
        name (str): All of it as a text, by which tables know it.
        make (Callable): Builds the layer for numbers of input and output channels.
        shape (tuple[int]): Shape of an input without its channels, (H, W), or () for vectors.
        tied (bool): Whether inputs and outputs are equally many: of depthwise convolutions.
        step (int): Numbers of channels have to be multiples of it: groups of a convolution.
    """
    name: str
    make: Callable[[int, int], nn.Module] = field(compare=False)
    shape: Tuple[int, ...] = field(compare=False)
    tied: bool = field(compare=False)
    step: int = field(compare=False)


@dataclass
class LatencyTable:
    """Times of layers in a program.

    Attributes:
        runtime (str): The program; see :data:`mmgcp.deployment.timing.RUNTIMES`.
        machine (str): The processor it was measured on.
        layers (dict[str, dict]): By the name of a :class:`LayerKind`: milliseconds by input and
            output channels.
    """
    runtime: str
    machine: str = field(default_factory=cpu_name)
    layers: Dict[str, Times] = field(default_factory=dict)

    def time(self, kind: str, inputs: int, outputs: int) -> float:
        """Interpolate the milliseconds of a layer, linearly in both numbers of channels.

        Beyond what was measured it is what is nearest.
        """
        times = self.layers[kind]
        if all(first == second for first, second in times):
            inputs = outputs  # a depthwise convolution
            below, above, share = _around(sorted({first for first, _ in times}), outputs)
            return (1 - share) * times[below, below] + share * times[above, above]
        low, high, across = _around(sorted({first for first, _ in times}), inputs)
        below, above, along = _around(sorted({second for _, second in times}), outputs)
        return ((1 - across) * ((1 - along) * times[low, below] + along * times[low, above])
                + across * ((1 - along) * times[high, below] + along * times[high, above]))

    def save(self, path: Union[str, Path]) -> None:
        """Write the table as JSON, whole or not at all."""
        layers = {name: [[*channels, time] for channels, time in sorted(times.items())]
                  for name, times in self.layers.items()}
        data = dict(format=FORMAT, version=1, runtime=self.runtime, machine=self.machine,
                    layers=layers)
        with replacing(path) as (temporary, ):
            temporary.write_text(json.dumps(data, indent=1) + '\n')

    @classmethod
    def load(cls, path: Union[str, Path]) -> 'LatencyTable':
        """Read a table.

        Raises:
            PruningError: There is no such file, or it is no table.
        """
        what = 'the latency table'
        data = parse_json(read_text(path, what, PruningError), f'{what} {path}', PruningError)
        if not isinstance(data, dict) or data.get('format') != FORMAT:
            raise PruningError(f'{path} is not a latency table')
        if data.get('version') != 1:
            raise PruningError(f'{what} {path} is of version {shorten(data.get("version"))}; this '
                               'mmgcp reads version 1')
        for key, kind in (('runtime', str), ('machine', str), ('layers', dict)):
            if not isinstance(data.get(key), kind):
                raise PruningError(f'{key} of {what} {path} cannot be {shorten(data.get(key))}')
        layers = {name: _read_times(name, rows, f'{what} {path}')
                  for name, rows in data['layers'].items()}
        return cls(data['runtime'], data['machine'], layers)


def _read_times(name: str, rows: Any, where: str) -> Times:
    """Read the times of a layer: all of a grid, or of a diagonal."""
    times: Times = {}
    for row in rows if isinstance(rows, list) else [None]:
        if not (isinstance(row, list) and len(row) == 3
                and all(type(number) is int and number > 0 for number in row[:2])
                and type(row[2]) in (int, float) and 0 <= row[2] < 1e9):
            raise PruningError(f'{where} must have [inputs, outputs, milliseconds] of layer '
                               f'{shorten(name)}, but has {shorten(row)}')
        times[row[0], row[1]] = float(row[2])
    grid = set(product({first for first, _ in times}, {second for _, second in times}))
    if not times or set(times) != grid and any(first != second for first, second in times):
        raise PruningError(f'{where} has gaps in what it says of layer {shorten(name)}')
    return times


def _around(widths: Sequence[int], wanted: int) -> Tuple[int, int, float]:
    """Find the widths on both sides of one, and how far it is from the lower to the upper."""
    place = bisect_left(widths, wanted)
    if place == 0 or place == len(widths):
        nearest = widths[min(place, len(widths) - 1)]
        return nearest, nearest, 0.
    low, high = widths[place - 1:place + 1]
    return low, high, (wanted - low) / (high - low)


def layer_kinds(model: nn.Module, shape: Sequence[int]) -> Dict[str, List[LayerKind]]:
    """Run a detector on an image (C, H, W) and say of what kind each layer is in each of its runs.

    Layers that do not run are left out.
    """
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, WEIGHT_TYPES)}
    found: Dict[str, List[LayerKind]] = {}
    for name, inputs, _ in record_shapes(model, layers, shape):
        found.setdefault(name, []).append(_kind(layers[name], inputs))
    return found


def _kind(layer: nn.Module, inputs: Sequence[int]) -> LayerKind:
    if isinstance(layer, nn.Linear):
        positions = tuple(inputs[1:-1])
        return LayerKind(f'Linear {"x".join(map(str, positions))}'.strip(),
                         lambda first, second: nn.Linear(first, second), positions, False, 1)
    settings = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding,
                    dilation=layer.dilation)
    if isinstance(layer, nn.ConvTranspose2d):
        settings['output_padding'] = layer.output_padding
    tied, kind = is_depthwise(layer), type(layer)
    kind = nn.ConvTranspose2d if issubclass(kind, nn.ConvTranspose2d) else nn.Conv2d
    text = ' '.join(f'{key}={value if isinstance(value, str) else "x".join(map(str, value))}'
                    for key, value in settings.items())
    groups = 'depthwise' if tied else f'groups={layer.groups}'

    def make(first: int, second: int) -> nn.Module:
        return kind(first, second, groups=second if tied else layer.groups, **settings)

    size = tuple(inputs[2:])
    return LayerKind(f'{kind.__name__} {text} {groups} map={"x".join(map(str, size))}', make, size,
                     tied, 1 if tied else layer.groups)


def widths(most: int, multiple: int, step: int = 1) -> List[int]:
    """Choose the widths to measure up to one: multiples, few of them, the least and the most."""
    multiple = multiple * step // math.gcd(multiple, step)
    chosen = {max(multiple, round(most * part / (POINTS - 1) / multiple) * multiple)
              for part in range(POINTS)}
    return sorted({width for width in chosen if width < most} | {most})


def fill_table(table: LatencyTable, model: nn.Module, kinds: Dict[str, List[LayerKind]],
               multiple: int, progress: Callable[[str, int, int], None]) -> bool:
    """Measure what a table lacks for the layers of a model.

    Args:
        table (LatencyTable): The table, which is filled.
        model (nn.Module): The model.
        kinds (dict[str, list[LayerKind]]): See :func:`layer_kinds`.
        multiple (int): Widths are multiples of it.
        progress (Callable): Called with a stage, the steps done in it, and all its steps.

    Returns:
        bool: Whether anything has been measured.
    """
    todo = lacks(table, model, kinds)
    for number, (kind, most) in enumerate(todo.items()):
        progress('timing layers', number, len(todo))
        table.layers[kind.name] = _measure(kind, most, multiple, table.runtime)
    progress('timing layers', len(todo), len(todo))
    return bool(todo)


def lacks(table: LatencyTable, model: nn.Module,
          kinds: Dict[str, List[LayerKind]]) -> Dict[LayerKind, List[int]]:
    """Find the kinds of layers that a table lacks, with the most input and output channels."""
    wanted: Dict[LayerKind, List[int]] = {}
    for name, several in kinds.items():
        for kind in several:
            most = wanted.setdefault(kind, [0, 0])
            most[:] = map(max, most, channel_counts(model.get_submodule(name)))
    return {kind: most for kind, most in wanted.items()
            if not _reaches(table.layers.get(kind.name, {}), most)}


def _reaches(times: Iterable[Tuple[int, int]], most: Sequence[int]) -> bool:
    """Whether times are known for layers as wide as the widest ones."""
    return all(any(channels[side] >= most[side] for channels in times) for side in (0, 1))


def _measure(kind: LayerKind, most: Sequence[int], multiple: int, runtime: str) -> Times:
    inputs, outputs = (widths(number, multiple, kind.step) for number in most)
    pairs = [(width, width) for width in outputs] if kind.tied else list(product(inputs, outputs))
    times = take_turns([layer_run(kind.make(*pair), (pair[0], *kind.shape), runtime)
                        for pair in pairs], RUNS, warmup=2)
    return {pair: statistics.median(taken) for pair, taken in zip(pairs, times)}

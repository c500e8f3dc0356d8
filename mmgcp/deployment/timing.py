# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The time that networks take in the programs that run them, also on a machine that is busy.

Times are CPU times of this process, unless there are several threads or a GPU, and what is
compared takes turns: what others compute at the same time makes all of it slower, and ratios stay.
"""
import platform
import statistics
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence

import torch
import torch.nn as nn

from mmgcp.errors import UserError
from mmgcp.nn.forward import flatten_tensors, random_image, run_as_tensors

from .exported import is_installed, open_exported, require
from .fusion import fused
from .options import ExportOptions
from .predictions import RawPredictions
from .writers import write, write_tensors

RUNTIMES = ('onnxruntime', 'openvino', 'torch')
_NEEDED = dict(onnxruntime=['onnx', 'onnxruntime'], openvino=['onnx', 'openvino'], torch=[])
_SUFFIXES = dict(onnxruntime='.onnx', openvino='.xml')


def check_runtime(runtime: str) -> None:
    """Raise a UserError unless a runtime can be used: it is known, and its packages are there."""
    if runtime not in RUNTIMES:
        raise UserError(f'runtime must be one of {", ".join(RUNTIMES)}, but is {runtime!r}')
    for package in _NEEDED[runtime]:
        require(package, f'to measure times in {runtime}')


def installed_runtimes() -> List[str]:
    """List the runtimes that can be used."""
    return [name for name in RUNTIMES if all(map(is_installed, _NEEDED[name]))]


def make_run(network: nn.Module, shape: Sequence[int], runtime: str) -> Callable[[], Any]:
    """Prepare a network, on one thread of the CPU.

    Args:
        network (nn.Module): A detector, which is copied and fused; in a file it has raw outputs.
        shape (Sequence[int]): Shape (C, H, W) of an image in pixels.
        runtime (str): One of :data:`RUNTIMES`.

    Returns:
        Callable: Runs it once on an image of noise.

    Raises:
        UserError: The runtime cannot be used, or the detector cannot be exported.
    """
    check_runtime(runtime)
    if runtime == 'torch':
        return torch_run(fused(network, shape).cpu().float(), shape)
    with exported_file(network, shape, _SUFFIXES[runtime]) as path:
        exported = open_exported(path)
    images = random_image(network, shape).float().cpu()
    return lambda: exported.run_batch(images)


@contextmanager
def exported_file(network: nn.Module, shape: Sequence[int], suffix: str) -> Iterator[Path]:
    """Write a detector, fused and with raw outputs, to a file that is gone after the block."""
    RawPredictions(network)  # whether it can be exported
    copied = fused(network, shape).cpu().float()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'network{suffix}'
        write(RawPredictions(copied).eval(), random_image(copied, shape), path, {},
              ExportOptions())
        yield path


def layer_run(layer: nn.Module, shape: Sequence[int], runtime: str) -> Callable[[], Any]:
    """Prepare a single layer, on one thread of the CPU; see :func:`make_run`.

    Args:
        layer (nn.Module): A convolution or linear layer.
        shape (Sequence[int]): Shape of its input without the batch: (C, H, W), or (..., C) given
            as (C, ...) for linear layers.
        runtime (str): One of :data:`RUNTIMES`.

    Returns:
        Callable: Runs it once on noise.
    """
    layer = layer.eval().requires_grad_(False)
    if isinstance(layer, nn.Linear):
        shape = (*shape[1:], shape[0])
    inputs = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    if runtime == 'torch':
        return _on_threads(lambda: layer(inputs), 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f'layer{_SUFFIXES[runtime]}'
        write_tensors(layer, inputs, path, {}, ExportOptions(), ['outputs'])
        exported = open_exported(path)
    return lambda: exported.run_batch(inputs)


def torch_run(network: nn.Module, shape: Sequence[int], threads: int = 1) -> Callable[[], Any]:
    """Prepare a network as it is, in eval mode and on its device; see :func:`make_run`."""
    image = random_image(network, shape)

    def run() -> Any:
        outputs = flatten_tensors(run_as_tensors(network, image))
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        return outputs

    return _on_threads(run, threads)


def _on_threads(function: Callable[[], Any], threads: int) -> Callable[[], Any]:
    def run() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with torch.no_grad():
                return function()
        finally:
            torch.set_num_threads(before)

    return run


def take_turns(runs: Sequence[Callable[[], Any]], rounds: int = 20, warmup: int = 3,
               clock: Optional[Callable[[], float]] = None) -> List[List[float]]:
    """Time functions in turns, each round in the opposite order of the last.

    Args:
        runs (Sequence[Callable]): The functions.
        rounds (int): How often each one is timed. Defaults to 20.
        warmup (int): How often each one runs before. Defaults to 3.
        clock (Callable, optional): Tells the seconds. Defaults to the CPU time of this process;
            several threads and GPUs need ``time.perf_counter``.

    Returns:
        list[list[float]]: The times in milliseconds of each one.
    """
    clock = clock or time.process_time
    times: List[List[float]] = [[] for _ in runs]
    for number in range(-warmup, rounds):
        order = range(len(runs)) if number % 2 else reversed(range(len(runs)))
        for index in order:
            start = clock()
            runs[index]()
            if number >= 0:
                times[index].append(1000 * (clock() - start))
    return times


def speedups(times: Sequence[Sequence[float]]) -> List[float]:
    """Return how many times as fast as the first one each is: medians of the rounds' ratios."""
    return [statistics.median(first / other for first, other in zip(times[0], item))
            for item in times]


def cpu_name() -> str:
    """The name of this machine's processor."""
    with suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()

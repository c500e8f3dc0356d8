# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The runs of layers, and which BatchNorms read what the layers emit."""
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Set

import torch.nn as nn
from mmengine.utils.dl_utils.parrots_wrapper import _BatchNorm
from torch import Tensor

from .forward import run_on_noise, working_shape
from .hooks import on_inputs, on_outputs

PRODUCER = '_mmgcp_producer'  # attribute of a tensor


def set_producer(tensor: Tensor, producer: Any) -> None:
    """Note on a tensor what emitted it, which is not None."""
    setattr(tensor, PRODUCER, (producer, tensor._version))


def producer_of(tensor: Tensor) -> Any:
    """Return what emitted a tensor, None if that was not noted or the tensor has changed since."""
    producer, version = getattr(tensor, PRODUCER, (None, None))
    return producer if version == tensor._version else None


@dataclass
class Call:
    """One run of a layer.

    Attributes:
        note (Any): What was noted of it.
        norms (list[str]): Names of the BatchNorms that read the output as it is.
    """
    note: Any
    norms: List[str] = field(default_factory=list)


class Calls(Dict[str, List[Call]]):
    """The runs of layers by name, in order.

    Attributes:
        foreign (set[str]): Names of the BatchNorms that also read anything else than the
            output of one of the layers as it is.
    """

    def __init__(self, names: Iterable[str]):
        super().__init__({name: [] for name in names})
        self.foreign: Set[str] = set()


@contextmanager
def recording_calls(model: nn.Module, notes: Mapping[str, Callable[[Tensor, Tensor], Any]],
                    then: Callable[[], Any] = lambda: None) -> Iterator[Calls]:
    """Record the runs of layers, and which BatchNorms read their outputs.

    Args:
        model (nn.Module): The model.
        notes (Mapping[str, Callable]): By name of the layer: a function of its input and its
            output, whose result is noted of each run.
        then (Callable): Called after each run of a layer and of a BatchNorm that follows one,
            such as :meth:`mmgcp.nn.forward.ShortRuns.seen`. Defaults to nothing.

    Yields:
        Calls: The runs. They may be cleared between runs of the model.
    """
    calls = Calls(notes)

    def record(name, inputs, output):
        call = Call(notes[name](inputs, output))
        calls[name].append(call)
        set_producer(output, call)
        then()

    def find_call(norm, inputs):
        call = producer_of(inputs)
        if call is None:
            calls.foreign.add(norm)
        else:
            call.norms.append(norm)
            then()

    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    with on_outputs(model, {name: partial(record, name) for name in notes}), \
            on_inputs(model, {name: partial(find_call, name) for name in norms}):
        yield calls


def following_norms(model: nn.Module, names: Iterable[str],
                    shape: Optional[Sequence[int]] = None) -> Dict[str, List[str]]:
    """Find the BatchNorms that read the outputs of layers as they are.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`. It runs once
            in eval mode on an image of noise.
        names (Iterable[str]): Names of the layers.
        shape (Sequence[int], optional): Shape (C, H, W) of the image. Defaults to a small one
            that the detector runs on.

    Returns:
        dict[str, list[str]]: Names of the BatchNorms by name of the layer, in the order in
        which they run: several where the layer runs several times. Empty for layers that
        no BatchNorm follows or that do not run.
    """
    shape = working_shape(model) if shape is None else shape
    with recording_calls(model, {name: lambda *_: None for name in names}) as calls:
        run_on_noise(model, shape)
    return {name: [norm for call in found for norm in call.norms]
            for name, found in calls.items()}

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The runs of layers, and which normalisation layers (norms) read what the layers emit."""
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import (
    Any,
    Callable,
    Collection,
    Dict,
    Hashable,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
)

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
    """One run of a layer: what was noted of it, and the norms that read its output as it is."""
    note: Any
    norms: List[str] = field(default_factory=list)


class Calls(Dict[str, List[Call]]):
    """The runs of layers by name, in order; may be cleared between runs of the model.

    ``foreign`` has the names of the norms that also read anything else than the output of one of
    the layers as it is.
    """

    def __init__(self, names: Iterable[str]):
        super().__init__({name: [] for name in names})
        self.foreign = set()


@contextmanager
def recording_calls(model: nn.Module, notes: Mapping[str, Callable[[Tensor, Tensor], Any]],
                    then: Callable[[], Any] = lambda: None,
                    norm_types: Tuple[type, ...] = (_BatchNorm, )) -> Iterator[Calls]:
    """Record the runs of layers, and which norms of some types read their outputs.

    By name of the layer, ``notes`` has a function of its input and its output, whose result is
    noted of each run. ``then`` is called after each run of a layer and of a norm that follows
    one, such as :meth:`mmgcp.nn.forward.ShortRuns.seen`.
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

    norms = [name for name, module in model.named_modules() if isinstance(module, norm_types)]
    with on_outputs(model, {name: partial(record, name) for name in notes}), \
            on_inputs(model, {name: partial(find_call, name) for name in norms}):
        yield calls


def following_norms(model: nn.Module, names: Iterable[str],
                    shape: Optional[Sequence[int]] = None,
                    norm_types: Tuple[type, ...] = (_BatchNorm, )) -> Dict[str, List[str]]:
    """Find the norms of some types that read the outputs of layers as they are.

    The detector runs once in eval mode on noise of a shape (C, H, W), by default a small one.
    Returns the names of the norms by name of the layer, in the order in which they run: several
    where the layer runs several times, none where none follows or the layer does not run.
    """
    shape = working_shape(model) if shape is None else shape
    notes = {name: lambda *_: None for name in names}
    with recording_calls(model, notes, norm_types=norm_types) as calls:
        run_on_noise(model, shape)
    return {name: [norm for call in found for norm in call.norms]
            for name, found in calls.items()}


def have_own_norms(runs: Mapping[str, Collection[Sequence[Hashable]]],
                   foreign: Iterable[Hashable]) -> Set[str]:
    """Return the layers of which each run is followed by norms that follow nothing else.

    By name of the layer, ``runs`` has the norms that follow each kind of its runs. ``foreign``
    are norms that also read what no layer emits.
    """
    uses = Counter(norm for found in runs.values() for norms in set(found) for norm in norms)
    shared = {*foreign, *(norm for norm, number in uses.items() if number > 1)}
    return {name for name, found in runs.items()
            if all(norms and shared.isdisjoint(norms) for norms in found)}

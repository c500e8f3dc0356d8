# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Finding blocks that can be removed as a whole, by what they compute, not by their names.

A module is a *residual block* if the output of one of its children can be set to zero so that it
emits what it reads, at most scaled by a parameter of its own: that child ends the branch beside
the shortcut. A *plain block* has no shortcut, but the shape of its output is that of its input,
and it stands in a row with others; without it, the next one reads what it has read.
"""
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from mmgcp.nn.forward import run_on_noise
from mmgcp.nn.hooks import hooked, on_outputs
from mmgcp.nn.layers import WEIGHT_TYPES
from mmgcp.nn.temporarily import Snapshot, eval_mode, values_kept
from mmgcp.pruning.surgery import BrokenError

from .removal import AbsentBlocks, remove_blocks_and_verify

RESIDUAL, PLAIN = 'residual', 'plain'
ROWS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Block:
    """A block that can be removed.

    Attributes:
        name (str): Name of the module.
        kind (str): 'residual' or 'plain'.
        branch (str): Of a residual block, the name of the child that ends its branch.
        scale (str, optional): Of a residual block, the name of its parameter that scales the
            shortcut.
    """
    name: str
    kind: str
    branch: str = ''
    scale: Optional[str] = None


Places = Sequence[Tuple[str, nn.Module]]  # all modules of a detector with all their names


class Blocks(NamedTuple):
    """The blocks of a detector."""
    found: List[Block]  # in the order of the modules
    skipped: Dict[str, str]  # what looks like them, but cannot be removed, with the reason

    def absent(self, names: Sequence[str]) -> AbsentBlocks:
        """Return what :func:`remove_blocks` has to know of blocks, by their names."""
        scales = {block.name: block.scale for block in self.found}
        return {name: scales[name] for name in names}


def find_blocks(model: nn.Module, shape: Sequence[int]) -> Blocks:
    """Find the blocks of a detector whose removal leaves it intact; change nothing.

    Of blocks within each other only the innermost ones count. They are removed for a try, with an
    image (C, H, W) of noise.

    Args:
        model (nn.Module): A detector; see :func:`mmgcp.nn.forward.run_as_tensors`.
        shape (Sequence[int]): Shape (C, H, W) of an image that it runs on.

    Returns:
        Blocks: Those that can be removed, and those that look like them.
    """
    runs = _record_runs(model, shape)
    places = list(model.named_modules(remove_duplicate=False))
    reasons = {name: _fault(places, name, runs[name]) for name in runs}
    found: Dict[str, Block] = {}
    deepest_first = sorted(runs, key=lambda name: -name.count('.'))
    for find in (_residual_block, _plain_block):
        for name in deepest_first:
            if reasons[name] is None and not _is_nested(name, found):
                block = find(model, name, runs[name])
                if block is not None:
                    found[name] = block
    skipped = _lookalikes(model, found, runs, reasons)
    broken: Dict[str, str] = {}
    for kind in (RESIDUAL, PLAIN):
        broken.update(_broken(model, [item for item in found.values() if item.kind == kind], shape))
    skipped.update(broken)
    return Blocks([found[name] for name in runs if name in found and name not in broken], skipped)


@dataclass
class _Runs:
    """What a module, which has children, reads and emits."""
    number: int = 0
    inputs: Optional[Tensor] = None  # of the last run, if that is all it reads
    read: Tuple[int, ...] = ()
    emitted: Tuple[int, ...] = ()
    children: List[str] = field(default_factory=list)  # those that emit such a tensor, in order


def _record_runs(model: nn.Module, shape: Sequence[int]) -> Dict[str, _Runs]:
    """Record the runs of all modules with children for an image (C, H, W) of noise."""
    modules = dict(model.named_modules())
    runs = {name: _Runs() for name, module in modules.items()
            if name and not isinstance(module, ROWS[1:]) and any(module.children())
            and any(isinstance(part, WEIGHT_TYPES) for part in module.modules())}
    outputs: Dict[str, Tuple[int, ...]] = {}
    order: List[str] = []

    def before(name: str, _: nn.Module, args: Tuple[Any, ...]) -> None:
        run = runs[name]
        run.number += 1
        if len(args) == 1 and isinstance(args[0], Tensor):
            run.inputs, run.read = args[0].clone(), tuple(args[0].shape[1:])

    def after(name: str, _: nn.Module, args: Tuple[Any, ...], output: Any) -> None:
        outputs[name] = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        order.append(name)
        if name in runs and (runs[name].read != outputs[name] or len(outputs[name]) < 2):
            runs[name].inputs = None  # frees memory

    with hooked([*(modules[name].register_forward_pre_hook(partial(before, name))
                   for name in runs),
                 *(module.register_forward_hook(partial(after, name))
                   for name, module in modules.items())]):
        run_on_noise(model, shape)
    for name, run in runs.items():
        run.emitted = outputs.get(name, ())
        run.children = [child for child in order if child.rpartition('.')[0] == name
                        and outputs[child] == run.emitted]
    return runs


def _fault(places: Places, name: str, run: _Runs) -> Optional[str]:
    """Say why a module can be no block, whatever it computes; None if it may be one."""
    if run.number != 1:
        return f'it runs {run.number} times for an image'
    if not run.read:
        return 'it reads more than one feature map'
    if len(run.emitted) < 2:
        return 'it does not emit one feature map'
    if run.inputs is None:
        return (f'it turns {_as_text(run.read)} into {_as_text(run.emitted)} (channels, height, '
                'width)')
    other = _owner_outside(places, name)
    return other and f'it shares layers with {other}'


def _as_text(shape: Tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape))


def _owner_outside(places: Places, name: str) -> Optional[str]:
    """Return a name outside of a module by which one of its layers or parameters is known."""
    inside = {module for other, module in places if f'{other}.'.startswith(f'{name}.')}
    for other, module in places:
        if module in inside and not f'{other}.'.startswith(f'{name}.'):
            return other
    params = {param for module in inside for param in module._parameters.values()
              if param is not None}
    return next((other for other, module in places if module not in inside
                 and any(param in params for param in module._parameters.values()
                         if param is not None)), None)


def _is_nested(name: str, found: Dict[str, Block]) -> bool:
    """Whether a module contains a block that has been found, or is in one."""
    return any(f'{other}.'.startswith(f'{name}.') or f'{name}.'.startswith(f'{other}.')
               for other in found)


@torch.no_grad()
def _residual_block(model: nn.Module, name: str, run: _Runs) -> Optional[Block]:
    """Return the residual block that a module is, if it is one."""
    module = model.get_submodule(name)
    if isinstance(module, ROWS):
        return None
    with eval_mode(module):
        for child in reversed(run.children):
            branch = child[len(name) + 1:]
            for scale, factor in _scales(module):
                if _emits(module, branch, run.inputs, factor):
                    return Block(name, RESIDUAL, branch, scale)
    return None


def _scales(module: nn.Module) -> Iterator[Tuple[Optional[str], float]]:
    """Yield the parameters that may scale a shortcut, set to 2 for a while; then None and 1."""
    for name, param in module.named_parameters(recurse=False):
        if param.numel() == 1:
            with values_kept([param]):
                param.fill_(2)
                yield name, 2.
    yield None, 1.


def _emits(module: nn.Module, branch: str, inputs: Tensor, factor: float) -> bool:
    """Whether a module emits its inputs times a factor where a branch of it emits zeros."""
    try:
        with on_outputs(module, {branch: lambda _, output: torch.zeros_like(output)}):
            return torch.equal(module(inputs.clone()), factor * inputs)
    except Exception:  # whatever the module raises, which does not run by itself
        return False


def _plain_block(model: nn.Module, name: str, run: _Runs) -> Optional[Block]:
    """Return the plain block that a module is, if it stands in a row with others."""
    row = model.get_submodule(name.rpartition('.')[0])
    return Block(name, PLAIN) if isinstance(row, ROWS) else None


def _lookalikes(model: nn.Module, found: Dict[str, Block], runs: Dict[str, _Runs],
                reasons: Dict[str, Optional[str]]) -> Dict[str, str]:
    """Return what is of the class of a block that has been found, and why it is none.

    Of the classes of plain blocks only what stands in a row looks like one.
    """
    kinds = {kind: {type(model.get_submodule(name)) for name, block in found.items()
                    if block.kind == kind} for kind in (RESIDUAL, PLAIN)}
    skipped = {}
    for name in runs:
        kind, row = (type(model.get_submodule(part)) for part in (name, name.rpartition('.')[0]))
        if not _is_nested(name, found) and (kind in kinds[RESIDUAL] or (
                kind in kinds[PLAIN] and issubclass(row, ROWS))):
            skipped[name] = reasons[name] or 'it has no shortcut, and stands in no row'
    return skipped


def _broken(model: nn.Module, blocks: Sequence[Block], shape: Sequence[int]) -> Dict[str, str]:
    """Return the blocks whose removal breaks a detector, with the reason, and change nothing."""
    everything = {block.name: block.scale for block in blocks}
    if not _try(model, everything, shape):
        return {}
    broken = {}
    for name, scale in everything.items():
        reason = _try(model, {name: scale}, shape)
        if reason:
            broken[name] = reason
    return broken


def _try(model: nn.Module, absent: AbsentBlocks, shape: Sequence[int]) -> str:
    """Say what is wrong with a model without blocks; '' if nothing is."""
    before = Snapshot(model)
    try:
        remove_blocks_and_verify(model, absent, shape)
    except BrokenError as error:
        return f'it cannot be removed: the model then {error.reason}'
    finally:
        before.restore()
    return ''

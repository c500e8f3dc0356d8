# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which modules emit the outputs of a detector's backbone and neck."""
import copy
from functools import partial
from typing import Any, Dict, Iterable, List, Optional

import torch.nn as nn
from mmengine.model import revert_sync_batchnorm
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.nn.forward import parts_only, run_on_noise, working_shape
from mmgcp.nn.hooks import on_outputs

from .features import FeatureRecorder


def find_part_outputs(model: nn.Module, part: str, owner: str = 'model') -> List[Optional[str]]:
    """Find the modules that emit the outputs of a part of a detector.

    The detector runs once on a small image of noise. A module emits an output if it ran
    exactly once and returned that very tensor. Of several such modules, the outermost one is
    taken (a stage rather than the last activation in it), of several outermost ones the last
    one to run, and an ``nn.Identity`` only if there is no other.

    Args:
        model (nn.Module): The detector, which is not changed.
        part (str): 'backbone' or 'neck'.
        owner (str): What to call the model in error messages. Defaults to 'model'.

    Returns:
        list[str | None]: The module's name for each output; None if no module of the part
        emits it, because it is the result of an operation such as an addition or an input
        that is passed on.

    Raises:
        UserError: The detector has no such part.
    """
    model = runnable_copy(model)
    whole = getattr(model, part, None)
    if whole is None:
        raise UserError(f'the {owner} has no {part}')
    modules = {f'{part}.{name}' if name else part: module
               for name, module in whole.named_modules()}
    returned: Dict[str, List[Any]] = {}  # in the order in which the modules finish

    def record(name: str, _: Any, output: Any) -> None:
        returned.setdefault(name, []).append(output)

    with parts_only(model, [part]):
        shape = working_shape(model)
        with on_outputs(model, {name: partial(record, name) for name in modules}):
            run_on_noise(model, shape)
    once = {name: outputs[0] for name, outputs in returned.items() if len(outputs) == 1}
    outputs = returned[part][0]
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [_choose_emitter([name for name, value in once.items() if value is output], modules)
            for output in outputs]


def count_feature_channels(model: nn.Module, names: Iterable[str],
                           owner: str = 'model') -> Dict[str, int]:
    """Count the channels of the features that modules of a detector return, by their names."""
    model = runnable_copy(model)
    names = list(names)
    with parts_only(model, names):
        shape = working_shape(model)
        with FeatureRecorder(model, names, owner).record() as features:
            run_on_noise(model, shape)
    return {name: feature.shape[1] for name, feature in features.items()}


def runnable_copy(model: nn.Module) -> nn.Module:
    """Return a copy that runs on a CPU, on which synchronised BatchNorm does not run."""
    return revert_sync_batchnorm(copy.deepcopy(model))


def _choose_emitter(candidates: List[str], modules: Dict[str, nn.Module]) -> Optional[str]:
    """Choose among modules that emit an output, listed in the order in which they finish."""
    candidates = [name for name in candidates
                  if not isinstance(modules[name], nn.Identity)] or candidates
    outermost = [name for name in candidates
                 if not any(name.startswith(f'{other}.') for other in candidates)]
    return outermost[-1] if outermost else None

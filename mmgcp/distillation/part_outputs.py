# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Which modules emit the outputs of a detector's backbone and neck."""
import copy
from typing import Any, Callable, Dict, Iterable, List, Optional

import torch.nn as nn
from mmengine.model import revert_sync_batchnorm
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.nn.forward import IMAGE_SHAPE, run_with_hooks, working_shape

from .feature_recorder import FeatureRecorder


def find_part_outputs(model: nn.Module, part: str, owner: str = 'model') -> List[Optional[str]]:
    """Find the modules that emit the outputs of a part of a detector.

    The detector runs once on a small image of noise. A module emits an output if it
    returned that very tensor, and ran only once. Of several the outermost is taken (a
    stage rather than the last activation in it), of several of these the last one to run,
    and an ``nn.Identity`` only if there is no other.

    Args:
        model (nn.Module): The detector; it is not changed.
        part (str): 'backbone' or 'neck'.
        owner (str): What to call the model in an error. Defaults to 'model'.

    Returns:
        list[str | None]: The module's name for each output, None for one that no module
        of the part emits: the result of an operation such as an addition, or an input that
        is handed through.

    Raises:
        UserError: The detector has no such part.
    """
    model = _runnable_copy(model)
    whole = getattr(model, part, None)
    if whole is None:
        raise UserError(f'the {owner} has no {part}')
    returned: Dict[str, List[Any]] = {}  # in the order in which the modules end

    def record(name: str) -> Callable:

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            returned.setdefault(name, []).append(output)

        return hook

    names = {f'{part}.{name}' if name else part: module for name, module in whole.named_modules()}
    shape = working_shape(model, IMAGE_SHAPE)
    run_with_hooks(model, shape, [module.register_forward_hook(record(name))
                                  for name, module in names.items()])
    once = {name: outputs[0] for name, outputs in returned.items() if len(outputs) == 1}
    outputs = returned[part][0]
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return [_emitter([name for name, value in once.items() if value is output], names)
            for output in outputs]


def count_channels(model: nn.Module, layers: Iterable[str], owner: str) -> Dict[str, int]:
    """Count the channels that modules of a detector return.

    Args:
        model (nn.Module): The detector; it is not changed.
        layers (Iterable[str]): Names of modules.
        owner (str): What to call the model in an error.

    Returns:
        dict[str, int]: Number of channels by name.
    """
    model = _runnable_copy(model)
    shape = working_shape(model, IMAGE_SHAPE)
    with FeatureRecorder(model, layers, owner) as features:
        run_with_hooks(model, shape, [])
    return {name: feature.shape[1] for name, feature in features.items()}


def _runnable_copy(model: nn.Module) -> nn.Module:
    """A copy that runs on a CPU, where synchronised normalisation does not."""
    return revert_sync_batchnorm(copy.deepcopy(model))


def _emitter(candidates: List[str], modules: Dict[str, nn.Module]) -> Optional[str]:
    """The one of the modules to take, which are in the order in which they end."""
    candidates = [name for name in candidates
                  if not isinstance(modules[name], nn.Identity)] or candidates
    outermost = [name for name in candidates
                 if not any(name.startswith(f'{other}.') for other in candidates)]
    return outermost[-1] if outermost else None

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Any, Callable, Dict, Iterable, Optional, Set, Tuple

import torch.nn as nn
from torch import Tensor

from mmgcp.nn.lookup import find_module


class FeatureRecorder:
    """Record the outputs of some modules while a model runs.

    It is a context manager: the hooks exist inside it only.

    .. code-block:: python

        with FeatureRecorder(model, ['backbone.stage1']) as features:
            model(images)
        features['backbone.stage1']  # (N, C, H, W)

    A feature is what the module returned, even if a later layer (an activation with
    ``inplace=True``) overwrites it: then it is a copy, in place of the tensor itself when the
    context ends. A copy is made as long as no run has shown that the output is left alone.

    Args:
        model (nn.Module): The model.
        names (Iterable[str]): Names of the modules, as in ``model.named_modules()``.
        owner (str): What to call the model in an error. Defaults to 'model'.
        left_alone (set[str], optional): Names of modules whose output no later layer
            overwrites; those that a run shows to be so are added. Defaults to None: a set
            of the recorder's own.

    Raises:
        UserError: The model has no module of such a name.
    """

    def __init__(self,
                 model: nn.Module,
                 names: Iterable[str],
                 owner: str = 'model',
                 left_alone: Optional[Set[str]] = None):
        self.owner = owner
        self.modules = {name: find_module(model, name, owner) for name in names}
        self.features: Dict[str, Tensor] = {}
        self.left_alone = set() if left_alone is None else left_alone
        self._copies: Dict[str, Tuple[Tensor, int]] = {}
        self._handles = []

    def __enter__(self) -> Dict[str, Tensor]:
        self.features = {}
        for name, module in self.modules.items():
            self._handles.append(module.register_forward_hook(self._build_hook(name)))
        return self.features

    def __exit__(self, error_type: Any, error: Any, traceback: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        features, self.features = self.features, {}
        copies, self._copies = self._copies, {}
        if error_type is not None:
            return
        silent = [name for name in self.modules if name not in features]
        if silent:
            raise RuntimeError(f'the module {silent[0]!r} of the {self.owner} did not run, '
                               'so there is no feature of it')
        for name, (duplicate, version) in copies.items():
            if features[name]._version == version:
                self.left_alone.add(name)
            else:
                features[name] = duplicate

    def _build_hook(self, name: str) -> Callable:
        features = self.features

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or output.dim() != 4:
                raise TypeError(f'the module {name!r} of the {self.owner} must return one feature '
                                f'map (N, C, H, W), but returns {_describe(output)}')
            if name in features:
                raise RuntimeError(f'the module {name!r} of the {self.owner} ran more than once, '
                                   'so its feature is ambiguous')
            features[name] = output
            if output.is_inference():  # nobody counts how often it is overwritten
                features[name] = output.clone()
            elif name not in self.left_alone:
                # Not used unless need be: it would change the order of summing gradients.
                self._copies[name] = output.clone(), output._version

        return hook


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f'a tensor of shape {tuple(output.shape)}'
    return f'a {type(output).__name__}'

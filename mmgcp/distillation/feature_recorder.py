# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from typing import Any, Callable, Dict, Iterable

import torch.nn as nn
from torch import Tensor

from mmgcp.utils.module_lookup import find_module


class FeatureRecorder:
    """Record the outputs of some modules while a model runs.

    It is a context manager: the hooks exist inside it only.

    .. code-block:: python

        with FeatureRecorder(model, ['backbone.stage1']) as features:
            model(images)
        features['backbone.stage1']  # (N, C, H, W)

    Args:
        model (nn.Module): The model.
        names (Iterable[str]): Names of the modules, as in ``model.named_modules()``.
        owner (str): What to call the model in an error. Defaults to 'model'.

    Raises:
        UserError: The model has no module of such a name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], owner: str = 'model'):
        self.owner = owner
        self.modules = {name: find_module(model, name, owner) for name in names}
        self.features: Dict[str, Tensor] = {}
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
        silent = [name for name in self.modules if name not in features]
        if error_type is None and silent:
            raise RuntimeError(f'the module {silent[0]!r} of the {self.owner} did not run, '
                               'so there is no feature of it')

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

        return hook


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f'a tensor of shape {tuple(output.shape)}'
    return f'a {type(output).__name__}'

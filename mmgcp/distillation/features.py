# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Where the features come from that are compared: recorded in the student and in the teacher."""
import copy
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
from mmengine.config import Config
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.nn.forward import parts_only, run_as_tensors
from mmgcp.nn.hooks import on_outputs
from mmgcp.nn.lookup import find_module
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.checks import MAPPING, PATH, checked, either, instance_of
from mmgcp.utils.config import build_detector, load_config

from .responses import HeadRun, recording_head, show_distributions


class FeatureRecorder:
    """Records the outputs of some modules while a model runs.

    .. code-block:: python

        recorder = FeatureRecorder(model, ['backbone.stage1'])
        with recorder.record() as features:
            model(images)
        features['backbone.stage1']  # (N, C, H, W)

    A feature is what the module returned, even if a later layer (an activation with
    ``inplace=True``) overwrites it: then a copy takes its place at the end of the block. The
    recorder remembers which outputs are not overwritten and stops copying them.

    Args:
        model (nn.Module): The model. Its modules may be replaced between two recordings.
        names (Iterable[str]): Names of the modules, as in ``model.named_modules()``.
        owner (str): What to call the model in error messages. Defaults to 'model'.

    Raises:
        UserError: The model has no module of such a name.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], owner: str = 'model'):
        self.model = model
        self.names = list(names)
        self.owner = owner
        for name in self.names:
            find_module(model, name, owner)
        self._never_overwritten: Set[str] = set()

    @contextmanager
    def record(self) -> Iterator[Dict[str, Tensor]]:
        """Record one run of the model: yield its features by name, complete at the end.

        Raises:
            UserError: A module did not run or ran more than once, or its output is not a
                feature map.
        """
        features: Dict[str, Tensor] = {}
        copies: Dict[str, Tuple[Tensor, int]] = {}

        def note(name: str, _: Any, output: Any) -> None:
            self._check(name, output, ran_before=name in features)
            features[name] = output
            if output.is_inference():  # such tensors do not count their changes
                features[name] = output.clone()
            elif name not in self._never_overwritten:
                # Only used if the output is overwritten: gradients that flow through a copy
                # are summed in another order.
                copies[name] = output.clone(), output._version

        with on_outputs(self.model, {name: partial(note, name) for name in self.names}):
            yield features
        silent = [name for name in self.names if name not in features]
        if silent:
            raise UserError(f'the module {silent[0]!r} of the {self.owner} has no feature, '
                            'because it did not run')
        for name, (duplicate, version) in copies.items():
            if features[name]._version == version:
                self._never_overwritten.add(name)
            else:
                features[name] = duplicate

    def _check(self, name: str, output: Any, ran_before: bool) -> None:
        if not isinstance(output, Tensor) or output.dim() != 4:
            found = (f'a tensor of shape {tuple(output.shape)}' if isinstance(output, Tensor)
                     else f'a {type(output).__name__}')
            raise UserError(f'the module {name!r} of the {self.owner} must return one feature '
                            f'map (N, C, H, W), but returns {found}')
        if ran_before:
            raise UserError(f'the module {name!r} of the {self.owner} ran more than once, so '
                            'its feature is ambiguous')


class FrozenTeacher:
    """A trained detector that is never changed.

    It is not an ``nn.Module``, so that a model can hold it without owning it: it is not part
    of the model's parameters and state dict, and a deep copy of the model, such as that of
    MMEngine's ``EMAHook``, shares it.

    Args:
        config (str | Path | dict): The teacher's config file (or ``mmyolo::...``), or
            the config of its model. Its ``init_cfg`` is ignored, so that nothing is
            downloaded for it.
        checkpoint (str | Path): The teacher's checkpoint.

    Raises:
        UserError: The config or the checkpoint does not exist, or they do not fit each
            other.
    """

    @checked(config=either(PATH, MAPPING, instance_of(Config, text=''),
                           text='must be a file or the config of a model'), checkpoint=PATH)
    def __init__(self, config: Union[str, Path, dict], checkpoint: Union[str, Path]):
        named = isinstance(config, (str, Path))
        # Without init_weights(), which would follow init_cfg
        self.module = build_detector(_read_config(config))
        load_strictly(self.module, str(checkpoint),
                      f"the teacher's config {config}" if named else "the teacher's config")
        self.module.eval()
        self.module.requires_grad_(False)
        self.record_features([])
        self._head_layers: Optional[List[str]] = None

    def __deepcopy__(self, memo: dict) -> 'FrozenTeacher':
        return self

    def record_features(self, names: Iterable[str]) -> None:
        """Choose the modules whose features :meth:`run` returns; unknown ones are a UserError."""
        self._recorder = FeatureRecorder(self.module, names, 'teacher')

    def record_head(self, layers: Iterable[str]) -> None:
        """Choose to record the head, and layers of it whose inputs are recorded, too.

        From then on, a head that computes boxes from distributions returns these, too.
        """
        self._head_layers = list(layers)
        show_distributions(self.module)

    @torch.no_grad()
    def run(self, inputs: Tensor) -> Tuple[Dict[str, Tensor], Optional[HeadRun]]:
        """Run the teacher on the device of the images (N, C, H, W).

        Returns the feature (N, C, H, W) of each chosen module by name, and the run of the head if
        it is recorded.
        """
        # The images say on which device to run and not the model, because averaged copies of
        # the model, which share this teacher, may be on another device.
        weight = next(self.module.parameters())
        if weight.device != inputs.device:
            self.module.to(inputs.device)
        inputs, head = inputs.to(weight.dtype), None
        with self._recorder.record() as features:
            if self._head_layers is None:
                with parts_only(self.module, self._recorder.names):
                    run_as_tensors(self.module, inputs)
            else:  # which does the same, but calls the head so that hooks notice
                with recording_head(self.module, self._head_layers) as head:
                    self.module.bbox_head(self.module.extract_feat(inputs))
        return features, head


def _read_config(config: Union[str, Path, dict]) -> Config:
    if isinstance(config, (str, Path)):
        return load_config(str(config))
    config = copy.deepcopy(config)  # because building a model changes its config
    if 'type' in config:
        return Config(dict(model=config))
    if 'model' not in config:
        raise UserError("the teacher's config describes no model")
    return config if isinstance(config, Config) else Config(config)

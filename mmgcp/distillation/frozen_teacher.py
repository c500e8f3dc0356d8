# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
from pathlib import Path
from typing import Any, Dict, List, Set, Tuple, Union

import torch
from mmengine.config import Config
from torch import Tensor

from mmgcp.errors import UserError
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.config import build_detector, load_config

from .feature_recorder import FeatureRecorder


class FrozenTeacher:
    """A trained detector that only shows its features.

    It is no ``nn.Module``, so that a model may hold it without owning it: neither
    the model's parameters nor its state dict have any of it, and a deep copy of the
    model (such as that of mmengine's ``EMAHook``) shares it.

    Args:
        config (str | Path | dict): The teacher's config file (or ``mmyolo::...``), or
            the config of its model. Its ``init_cfg`` is not used, so that nothing is
            downloaded for it.
        checkpoint (str | Path): The teacher's checkpoint.

    Raises:
        UserError: The config or the checkpoint does not exist, or they do not fit each
            other.
    """

    def __init__(self, config: Union[str, Path, dict], checkpoint: Union[str, Path]):
        named = isinstance(config, (str, Path))
        # init_weights() is never called: it would follow init_cfg.
        self.module = build_detector(_read_config(config))
        load_strictly(self.module, str(checkpoint),
                      f"the teacher's config {config}" if named else "the teacher's config")
        self.module.eval()
        self.module.requires_grad_(False)
        self._left_alone: Set[str] = set()

    def __deepcopy__(self, memo: dict) -> 'FrozenTeacher':
        return self

    def features(self, inputs: Tensor, names: List[str]) -> Dict[str, Tensor]:
        """Run the teacher on the device of the images.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            names (list[str]): Names of modules.

        Returns:
            dict[str, Tensor]: The output (N, C, H, W) of each of them.
        """
        return self.features_and_outputs(inputs, names)[0]

    @torch.no_grad()
    def features_and_outputs(self, inputs: Tensor,
                             names: List[str]) -> Tuple[Dict[str, Tensor], Any]:
        """Run the teacher as :meth:`features` does.

        Args:
            inputs (Tensor): Preprocessed images (N, 3, H, W).
            names (list[str]): Names of modules, maybe none.

        Returns:
            tuple[dict[str, Tensor], Any]: The output (N, C, H, W) of each of them, and what
            the teacher's head returned in eval mode.
        """
        # The batch says where to run rather than the model: an averaged copy of it,
        # which shares this teacher, may live on another device.
        weight = next(self.module.parameters())
        if weight.device != inputs.device:
            self.module.to(inputs.device)
        with FeatureRecorder(self.module, names, 'teacher', self._left_alone) as features:
            outputs = self.module(inputs.to(weight.dtype), mode='tensor')
        return features, outputs


def _read_config(config: Union[str, Path, dict]) -> Config:
    if isinstance(config, (str, Path)):
        return load_config(str(config))
    config = copy.deepcopy(config)  # to be built, which changes it
    if 'type' in config:
        return Config(dict(model=config))
    if 'model' not in config:
        raise UserError("the teacher's config describes no model")
    return config if isinstance(config, Config) else Config(config)

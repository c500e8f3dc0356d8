# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmgcp.registry import HOOKS

KEY = 'distill_adapters'


@HOOKS.register_module()
class DistillAdapterHook(Hook):
    """Save the adapters of a distiller in the checkpoint, next to the student's weights.

    The ``state_dict`` of the checkpoint is the student's alone; the adapters have a key
    ``distill_adapters`` of their own, which is only read when training is resumed. Without
    this hook a resumed training starts with new adapters.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the adapters to the checkpoint.

        Args:
            runner (Runner): The runner of the training.
            checkpoint (dict): The checkpoint to be saved.
        """
        adapters = _distiller(runner).distill_adapters
        checkpoint[KEY] = {name: value.cpu() for name, value in adapters.state_dict().items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Load the adapters from the checkpoint if training is resumed from it.

        Args:
            runner (Runner): The runner of the training.
            checkpoint (dict): The checkpoint that was loaded.
        """
        if runner._resume and KEY in checkpoint:
            _distiller(runner).load_adapters(checkpoint[KEY])


def _distiller(runner: Runner) -> nn.Module:
    return runner.model.module if is_model_wrapper(runner.model) else runner.model

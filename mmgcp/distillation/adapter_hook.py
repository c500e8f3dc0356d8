# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmgcp.errors import UserError
from mmgcp.registry import HOOKS
from mmgcp.utils.checks import checked

from .student_proxy import ADAPTERS


@HOOKS.register_module()
class DistillAdapterHook(Hook):
    """Save the adapters of a distiller in the checkpoint, next to the student's weights.

    The ``state_dict`` of the checkpoint is the student's alone; the adapters have a key
    ``distill_adapters`` of their own, which is only read when training is resumed. Without
    this hook a resumed training starts with new adapters.
    """

    @checked()
    def __init__(self) -> None:
        super().__init__()

    def before_train(self, runner: Runner) -> None:
        """Check that there is a distiller."""
        _distiller(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the adapters to the checkpoint."""
        adapters = _distiller(runner).distill_adapters
        checkpoint[ADAPTERS] = {name: value.cpu() for name, value in adapters.state_dict().items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Load the adapters from the checkpoint if training is resumed from it."""
        if runner._resume and ADAPTERS in checkpoint:
            _distiller(runner).load_adapters(checkpoint[ADAPTERS])


def _distiller(runner: Runner) -> nn.Module:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not hasattr(model, ADAPTERS):
        raise UserError('DistillAdapterHook needs a model of the type '
                        f'mmgcp.SpatialAttentionDistiller, but it is a {type(model).__name__}')
    return model

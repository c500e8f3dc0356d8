# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""MMEngine's runner, which says what of a checkpoint does not fit."""
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from .checkpoint import describe_misfit


class CheckedRunner(Runner):
    """A runner that reads bare state dicts, too, and says which weights do not fit the model."""

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call a function of all hooks; those that read a checkpoint find its ``state_dict``."""
        if fn_name == 'after_load_checkpoint':
            checkpoint = kwargs['checkpoint']
            if 'state_dict' not in checkpoint:  # in place, as the runner goes on with this object
                bare = dict(checkpoint)
                checkpoint.clear()
                checkpoint['state_dict'] = bare
        super().call_hook(fn_name, **kwargs)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict:
        """Load the weights that fit; a block of warnings tells the others, if there are any.

        Args:
            filename (str): The checkpoint.
            *args: See MMEngine's runner.
            **kwargs: See MMEngine's runner.

        Returns:
            dict: The checkpoint.

        Raises:
            UserError: No weight fits.
        """
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        misfit = describe_misfit(model, checkpoint, filename)
        if misfit:
            line = 70 * '-'
            self.logger.warning(f'\n{line}\n{misfit}\n{line}')
        return checkpoint

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What pruning needs besides the detector, from its config: images, and trainings on the way."""
import sys
from typing import Callable, Optional

import torch.nn as nn
from mmengine.config import Config

from mmgcp.datasets.calibration import CalibrationBatches, ImagesOf
from mmgcp.errors import PruningError, UserError
from mmgcp.nn.distributed import gather_over_ranks
from mmgcp.utils.checks import check_keys

from .finetuning import IntermediateFinetuning
from .recovery import Recovery


def find_images(batches: Optional[CalibrationBatches], needed: bool) -> Optional[ImagesOf]:
    """Look for training images; None, with a warning, where there are none.

    Args:
        batches (CalibrationBatches, optional): The training data, None to do without.
        needed (bool): Whether there have to be some.

    Returns:
        ImagesOf | None: The images.

    Raises:
        PruningError: There are none, but they are needed.
    """
    if batches is None:
        return None
    found, error = False, None
    try:
        found = next(iter(batches), None) is not None
    except UserError as caught:
        error = caught
    found, reasons = zip(*gather_over_ranks((found, str(error or ''))))
    reason = max(reasons) or ('' if any(found) else 'there are no training images')
    if not reason:
        return ImagesOf(batches)
    if needed:
        raise PruningError(reason) from error
    print(f'warning: {reason}; so nothing can be measured on images: channels are scored by '
          'their weights, and those that do not emit a constant are compensated by what their '
          'shifts alone emit')
    return None


def make_finetuning(cfg: Config, options: dict,
                    progress: Optional[Callable]) -> Optional[IntermediateFinetuning]:
    """Make the training between units or steps that prune_cfg asks for.

    By default there is one between steps, unless the detector recovers there.

    Args:
        cfg (Config): The detector's config.
        options (dict): Those of pruning, by name; ``finetune`` has the settings, and
            ``recover`` the recovery, if there is one.
        progress (Callable, optional): See :class:`IntermediateFinetuning`.

    Returns:
        IntermediateFinetuning | None: The training, None for none.

    Raises:
        PruningError: A setting is unknown or not allowed.
    """
    settings = options.get('finetune')
    if settings is None and _turns(options) > 1 and options.get('recover') is None:
        settings = {}
    if settings is None or settings is False:
        return None
    if not isinstance(settings, dict):
        raise PruningError('finetune of prune_cfg must have the settings epochs, lr and every, or '
                           f'be False, but is {settings!r}')
    check_keys(settings, ['epochs', 'lr', 'every'], 'finetune of prune_cfg', PruningError)
    return IntermediateFinetuning(cfg, **settings, progress=progress)


def _turns(options: dict) -> int:
    """The number of steps, of which a plan needs one."""
    return options.get('steps', 1) if options.get('plan') is None else 1


def make_recovery(cfg: Config, model: nn.Module, options: dict,
                  minutes: Optional[float] = None) -> Optional[Recovery]:
    """Make the recovery that prune_cfg asks for: at the end, and between steps without finetune.

    Args:
        cfg (Config): The detector's config.
        model (nn.Module): The detector.
        options (dict): Those of pruning, by name; ``recover`` has the settings.
        minutes (float, optional): Takes the place of those of the settings; 0 for none.

    Returns:
        Recovery | None: The recovery, None for none.

    Raises:
        PruningError: A setting is unknown or not allowed, or there are no training images.
    """
    settings = options.get('recover')
    if not (settings is None or isinstance(settings, dict)):
        raise PruningError('recover of prune_cfg must have the settings minutes, steps and lr, but '
                           f'is {settings!r}')
    settings = dict(settings or dict(minutes=0))
    if minutes is not None:
        settings['minutes'] = minutes
    check_keys(settings, ['minutes', 'steps', 'lr'], 'recover of prune_cfg', PruningError)
    batches = CalibrationBatches(cfg, model, sys.maxsize)  # all that there are
    turns = 1 if options.get('finetune') else _turns(options)
    recovery = Recovery(ImagesOf(batches), **settings, turns=turns)
    if settings.get('minutes') == 0:
        return None
    find_images(batches, needed=True)
    return recovery

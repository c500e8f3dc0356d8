# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Short trainings between the units that are pruned layer by layer."""
import copy
import itertools
import os
import tempfile
from typing import Callable, List, Optional

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgcp.errors import PruningError
from mmgcp.nn.training_loss import LATE_EPOCH
from mmgcp.utils.config import drop_collate_scope
from mmgcp.utils.process_state import random_states_kept

UNWANTED_HOOKS = ('EMA', 'Sparsity')
_numbers = itertools.count()  # MMEngine wants a new name for each training


class LayerFinetuning:
    """Trains a model between two sets, with the training settings of its config.

    Data, losses, optimizer and custom hooks are the config's; the learning rate is constant.
    Averaged weights and sparse training are left out, nothing is validated or saved, and
    heads that begin with an assigner for untrained networks are past that. The random
    numbers depend on the config's seed (0 if there is none) and the number of finished units
    alone, and those of the process go on as if nothing had happened.

    Args:
        cfg (Config): A whole config that trains by epochs.
        epochs (int): Epochs after each unit. Defaults to 1.
        lr (float, optional): Learning rate. Defaults to a tenth of the config's.
        every (int): Train after every so many units only. Defaults to 1.
        progress (Callable): Called with a stage, the iterations done, and all iterations.

    Attributes:
        settings (dict): ``epochs``, ``lr`` and ``every``.

    Raises:
        PruningError: The settings make no sense, or the config is no training by epochs.
    """

    def __init__(self, cfg: Config, epochs: int = 1, lr: Optional[float] = None, every: int = 1,
                 progress: Callable[[str, int, int], None] = lambda stage, done, steps: None):
        loop = cfg.get('train_cfg') or {}
        optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
        if not (cfg.get('train_dataloader') and 'lr' in optimizer):
            raise PruningError('fine-tuning between layers needs a config with a train_dataloader '
                               'and an optim_wrapper that has a learning rate')
        if not loop.get('by_epoch', 'IterBased' not in loop.get('type', '')):
            raise PruningError('fine-tuning between layers needs a config that trains by epochs')
        lr = 0.1 * optimizer['lr'] if lr is None else lr
        for name, value in dict(epochs=epochs, lr=lr, every=every).items():
            if not value > 0:
                raise PruningError(f'{name} of the fine-tuning must be positive, but is {value}')
        self.settings = dict(epochs=epochs, lr=lr, every=every)
        self._cfg = cfg
        self._progress = progress

    def __call__(self, model: nn.Module, number: int) -> None:
        """Train a model in place.

        Args:
            model (nn.Module): The model, perhaps with hooks that keep channels off. It may be
                on another device and in train mode afterwards.
            number (int): How many units have been pruned.
        """
        if number % self.settings['every']:
            return
        devices = range(torch.cuda.device_count())
        with tempfile.TemporaryDirectory() as folder, random_states_kept(devices):
            self._make_runner(model, number, folder).train()

    def _make_runner(self, model: nn.Module, number: int, folder: str) -> Runner:
        cfg = copy.deepcopy(self._cfg)
        optim_wrapper, loader = cfg.optim_wrapper, cfg.train_dataloader
        optim_wrapper['optimizer']['lr'] = self.settings['lr']
        drop_collate_scope(loader)
        randomness = dict(cfg.get('randomness') or {})
        randomness['seed'] = (randomness.get('seed') or 0) + number
        return _QuietRunner(
            model=model,
            work_dir=folder,
            train_dataloader=loader,
            train_cfg=dict(by_epoch=True, max_epochs=self.settings['epochs']),
            optim_wrapper=optim_wrapper,
            default_hooks=dict(checkpoint=None, logger=None, param_scheduler=None),
            custom_hooks=[*_wanted_hooks(cfg), _Follow(self._progress)],
            env_cfg=cfg.get('env_cfg') or dict(dist_cfg=dict(backend='nccl')),
            visualizer=dict(type='Visualizer', vis_backends=[]),
            log_level='WARNING',
            default_scope=cfg.get('default_scope', 'mmyolo'),
            randomness=randomness,
            experiment_name=f'layer-finetuning-{os.getpid()}-{next(_numbers)}',
            cfg=cfg)


def _wanted_hooks(cfg: Config) -> List[dict]:
    return [hook for hook in cfg.get('custom_hooks') or []
            if not any(name in str(hook.get('type')) for name in UNWANTED_HOOKS)]


class _QuietRunner(Runner):
    """A runner for a model that has its weights already."""

    def _init_model_weights(self) -> None:
        """Keep the weights."""

    def _log_env(self, *args, **kwargs) -> None:
        """Do not ask compilers and the like for their versions, which takes seconds."""


class _Follow(Hook):
    """Reports the iterations, and that it is late in the training.

    Args:
        progress (Callable): Called with a stage, the steps done in it, and all its steps.
    """
    priority = 'VERY_LOW'

    def __init__(self, progress: Callable[[str, int, int], None]):
        self._progress = progress

    def before_train_epoch(self, runner: Runner) -> None:
        runner.message_hub.update_info('epoch', LATE_EPOCH)

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        self._progress('fine-tuning', runner.iter + 1, runner.max_iters)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Fine-tuning a model between the channel units, or the steps, in which it is pruned."""
import copy
import itertools
import os
import tempfile
from typing import Callable, List, Optional

import torch.nn as nn
from mmengine.config import Config
from mmengine.dist import get_world_size, is_distributed
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import Runner

from mmgcp.errors import PruningError
from mmgcp.nn.distributed import sum_over_ranks
from mmgcp.nn.training_loss import LATE_EPOCH, cuda_devices
from mmgcp.utils.checks import COUNT, POSITIVE, check_value
from mmgcp.utils.config import drop_collate_scope, section
from mmgcp.utils.process_state import random_states_kept

from .schedules import FINE_TUNING

UNWANTED_HOOKS = ('EMA', 'Sparsity')
_numbers = itertools.count()  # MMEngine requires a new name for each training


class IntermediateFinetuning:
    """Fine-tunes a model between two channel units or steps as its config trains it.

    Data, losses, optimizer and custom hooks are those of the config. Differences: the learning
    rate is constant; there are no averaged weights and no sparse training; nothing is validated
    or saved; and heads that begin with an assigner for untrained networks are past that stage.
    Random numbers depend on the config's seed (0 if there is none) and the number of finished
    units or steps alone; the random states of the process are restored. It trains on the device
    of the model. Several processes train together, as with tools/dist_train.sh, and all have the
    same weights and statistics in the end.

    Args:
        cfg (Config): A complete config that trains by epochs.
        epochs (int): Epochs after each unit or step. Defaults to 1.
        lr (float, optional): Learning rate. Defaults to a tenth of the config's.
        every (int): Train only after every so many units or steps. Defaults to 1.
        progress (Callable): Called with the name of the stage, the number of finished
            iterations, and the number of all iterations. Defaults to nothing.

    Attributes:
        settings (dict): ``epochs``, ``lr`` and ``every``.

    Raises:
        PruningError: A setting is not a positive number, or the config cannot train by epochs.
    """

    def __init__(self, cfg: Config, epochs: int = 1, lr: Optional[float] = None, every: int = 1,
                 progress: Callable[[str, int, int], None] = lambda stage, done, steps: None):
        loop = section(cfg, 'train_cfg')
        optimizer = section(cfg, 'optim_wrapper').get('optimizer') or {}
        if not (cfg.get('train_dataloader') and 'lr' in optimizer):
            raise PruningError('fine-tuning between layers or steps needs a config with a '
                               'train_dataloader and an optim_wrapper that has a learning rate; '
                               'prune_cfg.finetune=False does without')
        if not loop.get('by_epoch', 'IterBased' not in loop.get('type', '')):
            raise PruningError('fine-tuning between layers or steps needs a config that trains by '
                               'epochs; prune_cfg.finetune=False does without')
        if lr is None:
            check_value("the learning rate of the config", optimizer['lr'], POSITIVE, PruningError)
            lr = FINE_TUNING * optimizer['lr']
        self.settings = dict(epochs=epochs, lr=lr, every=every)
        for name, check in (('epochs', COUNT), ('lr', POSITIVE), ('every', COUNT)):
            check_value(f'{name} of the fine-tuning', self.settings[name], check, PruningError)
        self._cfg = cfg
        self._progress = progress

    def __call__(self, model: nn.Module, number: int) -> None:
        """Train a model in place.

        Args:
            model (nn.Module): The model. Hooks that switch channels off stay in effect. It may
                be in training mode afterwards.
            number (int): Number of units or steps that have been pruned.
        """
        if number % self.settings['every']:
            return
        with tempfile.TemporaryDirectory() as folder, random_states_kept(cuda_devices(model)):
            self._make_runner(model, number, folder).train()
        _average_statistics(model)

    def _make_runner(self, model: nn.Module, number: int, folder: str) -> Runner:
        cfg = copy.deepcopy(self._cfg)
        cfg.optim_wrapper['optimizer']['lr'] = self.settings['lr']
        drop_collate_scope(cfg.train_dataloader)
        randomness = dict(cfg.get('randomness') or {})
        randomness['seed'] = (randomness.get('seed') or 0) + number
        return QuietRunner(
            model=model,
            work_dir=folder,
            train_dataloader=cfg.train_dataloader,
            train_cfg=dict(by_epoch=True, max_epochs=self.settings['epochs']),
            optim_wrapper=cfg.optim_wrapper,
            default_hooks=dict(checkpoint=None, logger=None, param_scheduler=None),
            custom_hooks=[*_wanted_hooks(cfg), _ProgressHook(self._progress)],
            env_cfg=cfg.get('env_cfg') or dict(dist_cfg=dict(backend='nccl')),
            launcher='pytorch' if is_distributed() else 'none',  # which has started us already
            visualizer=dict(type='Visualizer', vis_backends=[]),
            log_level='WARNING',
            default_scope=cfg.get('default_scope', 'mmyolo'),
            randomness=randomness,
            experiment_name=f'intermediate-finetuning-{os.getpid()}-{next(_numbers)}',
            cfg=cfg)


def _wanted_hooks(cfg: Config) -> List[dict]:
    return [hook for hook in cfg.get('custom_hooks') or []
            if not any(name in str(hook.get('type')) for name in UNWANTED_HOOKS)]


def _average_statistics(model: nn.Module) -> None:
    """Replace running statistics, which each rank has of its own images, by their mean."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(sum_over_ranks(buffer) / get_world_size())


class QuietRunner(Runner):
    """A runner for a model that already has its weights and its device, with less to print."""

    def wrap_model(self, model_wrapper_cfg: Optional[dict], model: nn.Module) -> nn.Module:
        """Wrap the model for several processes, if any, on whatever device it is."""
        if not self.distributed:
            return model
        settings = dict(broadcast_buffers=False, find_unused_parameters=self.cfg.get(
            'find_unused_parameters', False))
        settings.update(model_wrapper_cfg or {}, device_ids=cuda_devices(model) or None)
        settings.pop('type', None)
        return MMDistributedDataParallel(model, **settings)

    def _init_model_weights(self) -> None:
        """Keep the weights."""

    def _log_env(self, *args, **kwargs) -> None:
        """Skip querying the versions of compilers and the like, which takes seconds."""


class _ProgressHook(Hook):
    """Reports the iterations, and sets the epoch to a late one."""
    priority = 'VERY_LOW'

    def __init__(self, progress: Callable[[str, int, int], None]):
        self._progress = progress

    def before_train_epoch(self, runner: Runner) -> None:
        """Pretend that the training is past the stages for untrained networks."""
        runner.message_hub.update_info('epoch', LATE_EPOCH)

    def after_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Report an iteration."""
        self._progress('fine-tuning', runner.iter + 1, runner.max_iters)

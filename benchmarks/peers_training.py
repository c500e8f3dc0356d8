# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The one training loop of all that is compared."""
import copy
import itertools
import os
import sys
import tempfile
import time
from typing import List, Sequence

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmgcp.nn.training_loss import LATE_EPOCH
from mmgcp.pipeline.finetuning import QuietRunner
from mmgcp.utils.process_state import random_states_kept

# Of SGD and AdamW what left more of all rows after three epochs (docs/results.md)
OPTIM_WRAPPER = dict(type='OptimWrapper', optimizer=dict(type='AdamW', weight_decay=5e-4))
LR = 2e-4
_numbers = itertools.count()  # MMEngine requires a new name for each training


def train(model: nn.Module, cfg: Config, epochs: int, lr: float, seed: int,
          hooks: Sequence[dict] = ()) -> List[float]:
    """Train a model in place with the data, losses and optimizer of a config.

    The learning rate falls to a hundredth along a cosine. There are no averaged weights, no
    warm-up, and no other hooks of the config.

    Args:
        model (nn.Module): The model.
        cfg (Config): A complete config.
        epochs (int): Number of epochs.
        lr (float): The learning rate in the beginning.
        seed (int): Of all random choices: the order of the images and their augmentation.
        hooks (Sequence[dict]): Configs of more hooks, such as for sparse training.

    Returns:
        list[float]: The seconds that each epoch took.
    """
    optimizer = copy.deepcopy(cfg.optim_wrapper)
    optimizer['optimizer']['lr'] = lr
    cosine = dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True,
                  begin=0, end=epochs, T_max=epochs, eta_min=lr / 100)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder, random_states_kept():
        runner = QuietRunner(
            model=model,
            work_dir=folder,
            train_dataloader=cfg.train_dataloader,
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=optimizer,
            param_scheduler=cosine,
            default_hooks=dict(checkpoint=None, logger=None),
            custom_hooks=[*hooks, clock, _LateEpoch()],
            env_cfg=cfg.get('env_cfg') or dict(dist_cfg=dict(backend='nccl')),
            visualizer=dict(type='Visualizer', vis_backends=[]),
            log_level='WARNING',
            default_scope=cfg.get('default_scope', 'mmyolo'),
            randomness=dict(seed=seed),
            experiment_name=f'peers-{os.getpid()}-{next(_numbers)}',
            cfg=cfg)
        runner.train()
    return clock.seconds


@torch.no_grad()
def average(model: nn.Module, other: nn.Module) -> None:
    """Replace a model's weights by the means of its own and those of another one.

    Source: arXiv 2109.01903, with the share 1/2 of both, for models before and after a training.
    """
    theirs = other.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name].to(value), 0.5)


class _Clock(Hook):
    """Takes and prints the time of each epoch."""
    priority = 'LOWEST'

    def __init__(self):
        self.seconds: List[float] = []
        self._start = 0.

    def before_train_epoch(self, runner: Runner) -> None:
        self._start = time.perf_counter()

    def after_train_epoch(self, runner: Runner) -> None:
        self.seconds.append(time.perf_counter() - self._start)
        print(f'  epoch {runner.epoch + 1} of {runner.max_epochs}: {self.seconds[-1]:.0f} s',
              file=sys.stderr, flush=True)


class _LateEpoch(Hook):
    """Lets heads skip the assigners for untrained networks, with which some begin."""
    priority = 'VERY_LOW'

    def before_train_epoch(self, runner: Runner) -> None:
        runner.message_hub.update_info('epoch', LATE_EPOCH)

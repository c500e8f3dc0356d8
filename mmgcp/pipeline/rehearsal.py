# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A rehearsal of a training: everything that it is made of is built, and nothing is trained."""
import copy
import itertools
import os
import tempfile
from contextlib import contextmanager
from typing import Any, Iterator, List

import torch.nn as nn
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, DefaultScope
from mmyolo.utils import is_metainfo_lower
from torch.utils.data import DataLoader, Dataset

from mmgcp.compatibility import mend_openmmlab
from mmgcp.errors import UserError, told
from mmgcp.nn.lookup import number_of_classes
from mmgcp.utils.checkpoint import describe_misfit, read_checkpoint
from mmgcp.utils.checks import MAPPING, NOT_NEGATIVE, check_value, instance_of
from mmgcp.utils.config import build_detector, check_layout
from mmgcp.utils.process_state import alone, random_states_kept, silence

from .finetuning import QuietRunner

NEEDED = ('train_dataloader', 'train_cfg', 'optim_wrapper')
VALIDATION = ('val_dataloader', 'val_cfg', 'val_evaluator')
TESTING = ('test_dataloader', 'test_cfg', 'test_evaluator')
LIST = instance_of(list, tuple, text='must be a list')
_numbers = itertools.count()  # MMEngine requires a new name for each training


def rehearse_training(cfg: Config, with_data: bool = True) -> nn.Module:
    """Find what is wrong with the config of a training before it begins.

    The detector, hooks, data sets and their first image, the optimizer, schedulers and the
    validation are built as MMEngine's runner builds them, but in silence, in a temporary folder
    and without the visualizer's backends; hooks of mmgcp look at the detector as well. A
    checkpoint to start from is compared with the detector.

    Args:
        cfg (Config): A complete config, which is not changed.
        with_data (bool): Whether data sets are built, which may take as long as reading all
            annotations. Defaults to True.

    Returns:
        nn.Module: The detector, without the weights of the checkpoint.

    Raises:
        UserError: Something is wrong; says with which part of the config.
    """
    mend_openmmlab()
    cfg = copy.deepcopy(cfg)
    for name in NEEDED:
        check_value(f'{name} of the config', cfg.get(name), MAPPING)
    check_value('custom_hooks of the config', cfg.get('custom_hooks') or [], LIST)
    check_value('default_hooks of the config', cfg.get('default_hooks') or {}, MAPPING)
    optimizer = cfg.optim_wrapper.get('optimizer')
    if isinstance(optimizer, dict) and 'lr' in optimizer:
        check_value('optim_wrapper.optimizer.lr of the config', optimizer['lr'], NOT_NEGATIVE)
    with _aside(cfg) as folder:
        model = build_detector(cfg)
        _check_start(model, cfg)
        with _part('metainfo'):
            is_metainfo_lower(cfg)
        hooks = [_build_hook(hook) for hook in cfg.get('custom_hooks') or []]
        runner = _make_runner(cfg, model, hooks, folder)
        with _part('optim_wrapper'):
            runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        if with_data:
            _build_loops(runner)
            _check_classes(model, runner.train_dataloader.dataset)
            with _part('param_scheduler'):
                if runner.param_schedulers is not None:
                    runner.build_param_scheduler(runner.param_schedulers)
        for hook in hooks:
            if type(hook).__module__.startswith('mmgcp.'):
                hook.before_train(runner)
                hook.after_train(runner)
    return model


def rehearse_testing(cfg: Config) -> None:
    """Find what is wrong with the data and the metrics of a test before it begins.

    Args:
        cfg (Config): A complete config, which is not changed.

    Raises:
        UserError: Something is wrong; says with which part of the config.
    """
    mend_openmmlab()
    cfg = copy.deepcopy(cfg)
    for name in TESTING:
        if name != 'test_evaluator':
            check_value(f'{name} of the config', cfg.get(name), MAPPING)
    with _aside(cfg) as folder:
        runner = _make_runner(cfg, nn.Module(), [], folder)
        with _part('test_dataloader, test_cfg or test_evaluator'):
            loop = runner.build_test_loop(runner._test_loop)
            _load_first(loop.dataloader)


def _check_start(model: nn.Module, cfg: Config) -> None:
    """Compare the checkpoint that a training starts from with its detector."""
    path = cfg.get('load_from')
    if path and not cfg.get('resume'):
        describe_misfit(model, read_checkpoint(path), path)


def _build_hook(config: Any) -> Hook:
    check_value('each of the custom_hooks of the config', config, instance_of(
        dict, Hook, text='must be a config with a type'))
    if isinstance(config, Hook):
        return config
    config = {key: value for key, value in config.items() if key != 'priority'}
    with _part(f'custom_hooks ({config.get("type")})'):
        return HOOKS.build(config)


class _Rehearsal(QuietRunner):
    """A runner that is made for its mistakes."""

    def build_logger(self, *args, **kwargs) -> MMLogger:
        """Make a logger without a file, which would be left open where something is wrong."""
        logger = MMLogger.get_instance(self._experiment_name)
        logger.handlers.clear()  # models that are built later would write to its lost stdout
        return logger

    def dump_config(self) -> None:
        """Check only that it could be done, as laying out a config takes seconds."""
        check_layout()


def _make_runner(cfg: Config, model: nn.Module, hooks: List[Hook], folder: str) -> QuietRunner:
    with _part('training'):
        return _Rehearsal(
            model=model,
            work_dir=folder,
            **{name: cfg.get(name) for name in (*NEEDED, *VALIDATION, *TESTING)},
            auto_scale_lr=cfg.get('auto_scale_lr'),
            param_scheduler=cfg.get('param_scheduler'),
            default_hooks=cfg.get('default_hooks'),
            custom_hooks=hooks,
            env_cfg=cfg.get('env_cfg') or dict(dist_cfg=dict(backend='nccl')),
            log_processor=cfg.get('log_processor'),
            visualizer=dict(type='Visualizer', vis_backends=[]),
            log_level='ERROR',
            default_scope=cfg.get('default_scope', 'mmyolo'),
            experiment_name=f'rehearsal-{os.getpid()}-{next(_numbers)}',
            cfg=cfg)


def _build_loops(runner: QuietRunner) -> None:
    """Build the loops of training and validation with their data, and load the first image."""
    with _part('train_dataloader or train_cfg'):
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        _load_first(runner.train_dataloader)
    if runner._val_loop is not None:
        with _part('val_dataloader, val_cfg or val_evaluator'):
            runner._val_loop = runner.build_val_loop(runner._val_loop)


def _check_classes(model: nn.Module, dataset: Dataset) -> None:
    """Refuse labels that the detector has no outputs for, which would fail in the loss."""
    known = number_of_classes(model)
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if known is not None and isinstance(names, (list, tuple)) and len(names) > known:
        raise UserError(f'the training data has {len(names)} classes (metainfo: '
                        f'{", ".join(map(str, names[:3]))}{", ..." * (len(names) > 3)}), but the '
                        f'detector of the config has {known} (num_classes)')


def _load_first(loader: DataLoader) -> None:
    """Load the first image as a batch."""
    if not len(loader.dataset):
        raise UserError('there are no images')
    loader.collate_fn([loader.dataset[0]])


@contextmanager
def _aside(cfg: Config) -> Iterator[str]:
    """Yield a folder for things that leave nothing behind in the process."""
    scope = DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmyolo'))
    with random_states_kept(), scope, alone(), silence(with_warnings=True), \
            tempfile.TemporaryDirectory() as folder:
        yield folder


@contextmanager
def _part(name: str) -> Iterator[None]:
    """Turn any error in a part of a config into a UserError that names the part."""
    try:
        yield
    except UserError as error:
        raise UserError(f'{name} of the config: {error}') from error
    except Exception as error:  # whatever the constructors of any class raise
        raise UserError(f'{name} of the config cannot be built: {told(error)}') from error

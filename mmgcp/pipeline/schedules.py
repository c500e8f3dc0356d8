# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Fitting the schedule of a config to another number of epochs."""
import math
from typing import Dict, List, Optional

from mmengine.config import Config

from mmgcp.errors import UserError
from mmgcp.utils.checks import COUNT, POSITIVE, check_value
from mmgcp.utils.config import section
from mmgcp.utils.config_content import type_name

Settings = Dict[str, object]

ENDLESS = int(1e9)  # MMEngine's end of a scheduler without one
FINE_TUNING = 0.1  # share of the learning rate for a network that is to stay as good as it is
# Absolute learning rates in schedulers and hooks, which are scaled like the optimizer's
RATES = ('eta_min', 'eta_max', 'warmup_bias_lr')
# Defaults of MMYOLO's hooks, for configs that leave them out
HOOK_DEFAULTS = dict(
    YOLOv5ParamSchedulerHook=dict(
        max_epochs=300, warmup_epochs=3, warmup_bias_lr=0.1, warmup_mim_iter=1000),
    PPYOLOEParamSchedulerHook=dict(total_epochs=360, warmup_epochs=5, warmup_min_iter=1000))


def base_epochs(cfg: Config) -> int:
    """Return the number of epochs of a config.

    Raises:
        UserError: It has none, because it trains by iterations or not at all.
    """
    epochs = section(cfg, 'train_cfg').get('max_epochs')
    if epochs is not None:
        check_value('train_cfg.max_epochs of the config', epochs, COUNT)
    if not epochs:
        raise UserError('the config says no number of epochs (train_cfg.max_epochs): only '
                        'configs that train by epochs, not by iterations, can be used')
    return epochs


def default_epochs(base: int) -> int:
    """Return the epochs of a later stage: a sixth of the first stage's, from 50 to all of them."""
    return min(base, max(50, round(base / 6)))


def derive_schedule(cfg: Config, epochs: int, lr: Optional[float] = None, trained: bool = True,
                    num_images: Optional[int] = None) -> Settings:
    """Fit everything in a config that depends on its number of epochs to another number.

    A phase at the end of the training, such as the epochs without mosaic, keeps its length
    in epochs, up to 40 % of the new training. A warm-up in epochs keeps its length up to a
    tenth of it. All other points in time move in proportion. Whatever is counted in iterations
    stays as it is, except that a warm-up takes at most a tenth of the training if the number
    of images is known.

    Args:
        cfg (Config): The base config, read.
        epochs (int): The new number of epochs.
        lr (float, optional): The new learning rate; absolute rates of the schedulers are
            scaled by the same factor. Defaults to the base's.
        trained (bool): Whether the network is already trained. If so, the first assigner of
            YOLOv6 and PPYOLOE, which is meant for untrained networks, is skipped. Defaults to
            True.
        num_images (int, optional): Number of images in an epoch.

    Returns:
        dict: Settings by dotted key, for MMEngine's ``Config.merge_from_dict``.

    Raises:
        UserError: The config has no number of epochs, or no learning rate to change.
    """
    timeline = _Timeline(base_epochs(cfg), epochs)
    before, factor = base_lr(cfg), 1.
    if lr is not None:
        if before is None:
            raise UserError('the config says no learning rate (optim_wrapper.optimizer.lr) to '
                            'change')
        factor = lr / before
    warm_up = ENDLESS
    if num_images is not None:
        warm_up = max(1, epochs * math.ceil(num_images / cfg.train_dataloader.batch_size) // 10)
    changes = {
        'max_epochs': epochs,
        'train_cfg.max_epochs': epochs,
        **_validation(cfg, timeline),
        **_scheduler_hook(cfg, timeline, factor, warm_up),
        **_schedulers(cfg, timeline, factor, warm_up),
        **_custom_hooks(cfg, timeline),
        **_first_assigner(cfg, timeline, trained)
    }
    if lr is not None:
        changes['optim_wrapper.optimizer.lr'] = lr
        if 'base_lr' in cfg:
            changes['base_lr'] = _scaled(cfg.base_lr, factor)
    return changes


class _Timeline:
    """Maps points in time, in epochs, from the base schedule to the new one."""

    def __init__(self, base: int, new: int):
        self.base, self.new = base, new

    def scale(self, length: float) -> int:
        return round(length * self.new / self.base)

    def move(self, point: int) -> int:
        rest = self.base - point
        return self.new - self.last(rest) if 0 <= 10 * rest <= self.base else self.scale(point)

    def last(self, length: int) -> int:
        """Return the new length of a phase at the end."""
        if self.new == self.base:
            return length
        if 10 * length > self.base:
            return self.scale(length)
        return min(length, 2 * self.new // 5)

    def warm_up(self, length: float) -> float:
        """Return the new length of a phase at the beginning."""
        if self.new >= self.base:
            return length
        return min(length, max(1, self.new // 10))

    def is_warm_up(self, point: int) -> bool:
        return 10 * point <= self.base


def base_lr(cfg: Config) -> Optional[float]:
    """Return the learning rate of a config, None if it says none or 0."""
    lr = (section(cfg, 'optim_wrapper').get('optimizer') or {}).get('lr')
    if lr:
        check_value('optim_wrapper.optimizer.lr of the config', lr, POSITIVE)
    return lr or None


def _validation(cfg: Config, timeline: _Timeline) -> Settings:
    interval = cfg.train_cfg.get('val_interval', 1)
    changes = {'train_cfg.val_interval': min(interval, timeline.new)}
    if cfg.train_cfg.get('dynamic_intervals'):
        moved = [(timeline.move(epoch), interval)
                 for epoch, interval in cfg.train_cfg.dynamic_intervals]
        moved = [(epoch, interval) for epoch, interval in moved if 0 <= epoch < timeline.new]
        changes['train_cfg.dynamic_intervals'] = moved or None
    return changes


def _scheduler_hook(cfg: Config, timeline: _Timeline, factor: float, warm_up: int) -> Settings:
    """Fit MMYOLO's hooks that take the place of schedulers."""
    hook = (cfg.get('default_hooks') or {}).get('param_scheduler') or {}
    hook = {**HOOK_DEFAULTS.get(type_name(hook.get('type')), {}), **hook}
    changes = {}
    for name in ('max_epochs', 'total_epochs'):  # PPYOLOE's cosine ends after the training
        if name in hook:
            changes[name] = max(timeline.new, timeline.scale(hook[name]))
    if 'warmup_epochs' in hook:
        shortened = timeline.warm_up(hook['warmup_epochs'])
        if shortened != hook['warmup_epochs']:
            changes['warmup_epochs'] = shortened
    for name in ('warmup_mim_iter', 'warmup_min_iter'):  # YOLOv5's, PPYOLOE's
        if hook.get(name, 0) > warm_up:
            changes[name] = warm_up
    changes.update(_scaled_rates(hook, factor))
    return {f'default_hooks.param_scheduler.{name}': value for name, value in changes.items()}


def _scaled_rates(settings: dict, factor: float) -> Settings:
    if factor == 1:
        return {}
    return {name: _scaled(settings[name], factor) for name in RATES if settings.get(name)}


def _scaled(rate: float, factor: float) -> float:
    return float(f'{rate * factor:.6g}')


def _schedulers(cfg: Config, timeline: _Timeline, factor: float, warm_up: int) -> Settings:
    schedulers = cfg.get('param_scheduler') or []
    single = isinstance(schedulers, dict)
    schedulers = [dict(item) for item in ([schedulers] if single else schedulers)]
    moved = _moved_points(schedulers, timeline)
    changes = [{**_moved_scheduler(item, moved, timeline, warm_up), **_scaled_rates(item, factor)}
               for item in schedulers]
    new = [{**item, **change} for item, change in zip(schedulers, changes)]
    kept = [item for item in new if _begin(item) < _end(item)]
    if len(kept) < len(new):  # there is no time left for some
        return {'param_scheduler': kept}
    return {f'param_scheduler.{name}' if single else f'param_scheduler.{index}.{name}': value
            for index, change in enumerate(changes) for name, value in change.items()
            if value != schedulers[index].get(name)}


def _begin(scheduler: dict) -> int:
    return scheduler.get('begin', 0)


def _end(scheduler: dict) -> int:
    return scheduler.get('end', ENDLESS)


def _by_epoch(scheduler: dict) -> bool:
    return scheduler.get('by_epoch', True)


def _moved_points(schedulers: List[dict], timeline: _Timeline) -> Dict[int, int]:
    """Map all points in time of the schedulers, preserving their order."""
    points = {0, timeline.base}
    for scheduler in filter(_by_epoch, schedulers):
        points.update((_begin(scheduler), _end(scheduler)), scheduler.get('milestones', ()))
    moved, following = {ENDLESS: ENDLESS}, ENDLESS
    for point in sorted(points - {ENDLESS}, reverse=True):
        new = timeline.warm_up(point) if timeline.is_warm_up(point) else timeline.move(point)
        moved[point] = following = min(int(new), following)
    return moved


def _moved_scheduler(scheduler: dict, moved: Dict[int, int], timeline: _Timeline,
                     warm_up: int) -> Settings:
    if not _by_epoch(scheduler):
        is_warm_up = _begin(scheduler) == 0 and warm_up < _end(scheduler) < ENDLESS
        return dict(end=warm_up) if is_warm_up else {}
    begin, end = _begin(scheduler), _end(scheduler)
    changes = {name: moved[scheduler[name]] for name in ('begin', 'end') if name in scheduler}
    new_begin, new_end = moved[begin], moved[end]
    for name in ('T_max', 'total_steps', 'step_size'):
        if scheduler.get(name):
            fitting = {end: new_end, end - begin: new_end - new_begin}
            length = fitting.get(scheduler[name], timeline.scale(scheduler[name]))
            changes[name] = max(1, length)
    if 'milestones' in scheduler:
        milestones = {moved[point] for point in scheduler['milestones']}
        changes['milestones'] = sorted(point for point in milestones if 0 < point < timeline.new)
    if new_end - new_begin == 1 < end - begin:
        # A single step would leave the rate where the scheduler begins
        changes['convert_to_iter_based'] = True
    return changes


def _custom_hooks(cfg: Config, timeline: _Timeline) -> Settings:
    changes = {}
    for index, hook in enumerate(cfg.get('custom_hooks') or []):
        for name, move in (('switch_epoch', timeline.move), ('begin_epoch', timeline.move),
                           ('num_last_epochs', timeline.last)):
            if hook.get(name) and move(hook[name]) != hook[name]:
                changes[f'custom_hooks.{index}.{name}'] = move(hook[name])
    return changes


def _first_assigner(cfg: Config, timeline: _Timeline, trained: bool) -> Settings:
    """Fit or skip the assigner for untrained networks, with which YOLOv6 and PPYOLOE begin."""
    before = (cfg.model.get('train_cfg') or {}).get('initial_epoch')
    if not before:
        return {}
    after = 0 if trained else max(1, timeline.scale(before))
    return {'model.train_cfg.initial_epoch': after} if after != before else {}

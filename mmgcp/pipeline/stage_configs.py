# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The configs of the stages, each of which can also be run by hand."""
from typing import Dict, List, Optional, Union

from mmengine.config import Config

from mmgcp.datasets import VOCInfo
from mmgcp.pruning.detector import drop_hooks
from mmgcp.utils.config import drop_collate_scope

from .child_config import override
from .schedules import FINE_TUNING, base_lr, derive_schedule
from .voc_data import num_training_images, use_voc_data

# The usual rate of each penalty. With Adam, a scale factor moves by at most lr * rate in an
# iteration; with SGD and momentum, by up to lr / (1 - momentum) * rate.
SPARSITY_RATES = dict(subgradient=1e-3, proximal=2e-2)


def baseline_config(cfg: Config, epochs: int, voc: Optional[VOCInfo] = None,
                    options: Optional[Dict[str, object]] = None, lr: Optional[float] = None,
                    train_list: Optional[str] = None) -> Config:
    """Make the config of the first stage: the user's, with their data and schedule.

    Args:
        cfg (Config): The user's config.
        epochs (int): Number of epochs.
        voc (VOCInfo, optional): A folder in VOC's layout to train and test on instead
            of the config's own data.
        options (dict, optional): Settings to override, by dotted key; they also take
            precedence over everything that is changed here.
        lr (float, optional): Learning rate. Defaults to the config's.
        train_list (str, optional): File that lists the training images of ``voc``.
            Defaults to that of its only training split.

    Returns:
        Config: The config.
    """
    options = options or {}
    cfg = override(cfg, options)
    schedule = derive_schedule(cfg, epochs, lr, trained=False, num_images=num_training_images(voc))
    _import_mmgcp(cfg)
    drop_collate_scope(cfg.get('train_dataloader') or {})
    if voc is not None:
        use_voc_data(cfg, voc, train_list)
    # A checkpoint of each epoch, from which an interrupted training resumes
    checkpoints = dict(interval=1, max_keep_ckpts=2, save_best=None)
    cfg.merge_from_dict({f'default_hooks.checkpoint.{name}': value
                         for name, value in checkpoints.items()})
    return override(override(cfg, options), {
        key: value for key, value in schedule.items()
        if not any(f'{key}.'.startswith(f'{name}.') for name in options)})


def sparse_config(cfg: Config, checkpoint: str, epochs: int, hook: Dict[str, object],
                  lr: Optional[float] = None, num_images: Optional[int] = None) -> Config:
    """Make the config of sparse training.

    Args:
        cfg (Config): The baseline's config.
        checkpoint (str): The trained baseline.
        epochs (int): Number of epochs.
        hook (dict): The sparsity hook, see :func:`sparsity_hook`.
        lr (float, optional): Learning rate. Defaults to the baseline's.
        num_images (int, optional): Number of training images, if known.

    Returns:
        Config: The config.
    """
    cfg = override(cfg, derive_schedule(cfg, epochs, lr, num_images=num_images))
    cfg.load_from = str(checkpoint)
    drop_hooks(cfg)  # that of the user's config, which would press a second time
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    return cfg


def sparsity_hook(cfg: Config, rate: Optional[float] = None, penalty: Optional[str] = None,
                  schedule: str = 'two_phase') -> Dict[str, object]:
    """Choose a sparsity hook that suits a config.

    Args:
        cfg (Config): The config, which may have a ``sparsity_rate``.
        rate (float, optional): Defaults to ``sparsity_rate``, or to what is usual for the
            penalty: 1e-3 for the subgradient, 2e-2 for the proximal one.
        penalty (str, optional): Defaults to 'proximal' for Adam and its variants, which
            would rescale a gradient, and to 'subgradient' for other optimizers.
        schedule (str): Type of the schedule. Defaults to 'two_phase'.

    Returns:
        dict: The config of the hook.
    """
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if penalty is None:
        is_adam = 'adam' in str(optimizer.get('type')).lower()
        penalty = 'proximal' if is_adam else 'subgradient'
    if rate is None:
        rate = cfg.get('sparsity_rate', SPARSITY_RATES[penalty])
    return dict(
        type='mmgcp.DynamicSparsityHook', rate=rate, schedule=dict(type=schedule),
        modules='prunable', penalty=penalty)


def distill_config(cfg: Config, teacher: str, checkpoint: str, epochs: int,
                   groups: Union[str, List[dict]] = 'auto', lr: Optional[float] = None,
                   num_images: Optional[int] = None) -> Config:
    """Make the config of spatial attention distilling.

    Args:
        cfg (Config): The config of the pruned detector, the student.
        teacher (str): File with the config of the baseline, the teacher.
        checkpoint (str): The trained baseline.
        epochs (int): Number of epochs.
        groups (str | list[dict]): Groups of layers whose attention is distilled.
            Defaults to 'auto'.
        lr (float, optional): Learning rate. Defaults to a tenth of the baseline's: the whole one
            can throw back a network that is trained.
        num_images (int, optional): Number of training images, if known.

    Returns:
        Config: The config.
    """
    if lr is None:
        before = base_lr(cfg)
        lr = before and FINE_TUNING * before
    cfg = override(cfg, derive_schedule(cfg, epochs, lr, num_images=num_images))
    cfg.model = dict(
        type='mmgcp.SpatialAttentionDistiller',
        student=cfg.model,
        teacher=dict(config=str(teacher), checkpoint=str(checkpoint)),
        groups=groups)
    return cfg


def _import_mmgcp(cfg: Config) -> None:
    """Import mmgcp in addition to what the config imports."""
    imports = cfg.get('custom_imports', {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmgcp' not in imports:
        cfg.custom_imports = dict(imports=[*imports, 'mmgcp'], allow_failed_imports=False)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruned detectors: ordinary ones, reduced to the channels that a table lists; their configs."""
import copy
from pathlib import Path
from typing import Any, List, Optional, Sequence, Union

import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT
from mmyolo.registry import MODELS as MMYOLO_MODELS

from mmgcp.errors import PruningError, UserError
from mmgcp.registry import MODELS, build_model
from mmgcp.utils.checkpoint import load_strictly
from mmgcp.utils.checks import MAPPING, PATH, TYPE, checked, either
from mmgcp.utils.config import (
    build_detector,
    drop_collate_scope,
    drop_pretrained,
    load_config,
    nested_dicts,
)
from mmgcp.utils.config_content import plain_content, type_name

from .blocks.removal import AbsentBlocks, remove_blocks
from .channel_table import ChannelTable, apply_channel_table, merged_tables, without_blocks

PRUNED_DETECTOR = 'mmgcp.PrunedDetector'
SPARSITY_HOOK = 'DynamicSparsityHook'
CHECKPOINT = '{{ fileDirname }}/pruned.pth'  # MMEngine fills in the folder of the config file


@MODELS.register_module()
@checked(PruningError, detector=TYPE, channels=either(
    PATH, MAPPING, text='must be the channels by layer, or a file that has them'),
    absent_blocks=MAPPING)
def PrunedDetector(detector: str, channels: Union[ChannelTable, str, Path],  # noqa: N802
                   original_classes: Optional[Sequence[int]] = None,
                   absent_blocks: Optional[AbsentBlocks] = None,
                   **kwargs: Any) -> nn.Module:
    """Build a pruned detector: an ordinary one with fewer channels in some layers, or fewer blocks.

    The registry calls this function like a class. What it returns is of the original
    detector's class, and its parameters have their original names.

    .. code-block:: python

        _base_ = 'my_detector.py'
        load_from = 'pruned/pruned.pth'
        model = dict(
            type='mmgcp.PrunedDetector',
            detector=_base_.model.type,
            channels='pruned/pruned.py')  # both written by tools/prune.py

    Args:
        detector (str): Type of the original detector, such as ``'YOLODetector'``.
        channels (dict[str, list[int | None]] | str | Path): The numbers of channels left in
            the pruned layers: [in, out] of convolutions and linear layers, [features] of
            normalisation layers and bare parameters; or the ``pruned.py`` that has this
            table. A relative path starts at the working directory. None stands for as many as
            the arguments of the detector lead to, such as outputs for another number of classes.
        original_classes (Sequence[int], optional): The numbers of classes in the arguments of
            the detector that was pruned. Where they are others now, layers that have become too
            narrow for the table, as the hidden layers of YOLOv8's head do, are widened with
            copies of their first channels. Defaults to None: no layer is widened.
        absent_blocks (dict[str, str | None], optional): The blocks that are left out, each with
            the name of the parameter that scales its shortcut, None if there is none. Defaults to
            None: those of the ``pruned.py`` that has the channels, if it is given.
        **kwargs: The arguments of the original detector. Pretrained weights in any
            ``init_cfg`` are ignored, as they have the original's channels.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: There is no such file, or the table does not fit the detector.
    """
    table, absent = read_channel_table(channels), read_absent_blocks(channels, absent_blocks)
    kwargs = copy.deepcopy(kwargs)
    drop_pretrained(kwargs)
    model = build_model(MMYOLO_MODELS, dict(type=detector, **kwargs), f'detector {detector!r}',
                        PruningError)
    remove_blocks(model, absent)
    apply_channel_table(model, table, widen=original_classes is not None and (
        list(original_classes) != _numbers_of_classes(kwargs)))
    return model


def registered_name(kind: type) -> str:
    """Return the name by which registries build a class, with its scope: 'mmyolo.YOLODetector'.

    That of a class in no registry of models is where it is imported from.
    """
    pending = [ROOT]
    while pending:
        registry = pending.pop(0)
        for name, registered in registry.module_dict.items():
            if registered is kind:
                return f'{registry.scope}.{name}'
        pending.extend(registry.children.values())
    return f'{kind.__module__}.{kind.__qualname__}'


def read_channel_table(channels: Union[ChannelTable, str, Path]) -> ChannelTable:
    """Return the channel table that the ``channels`` of a :func:`PrunedDetector` stand for.

    Raises a PruningError if there is no such file or it has no table.
    """
    if not isinstance(channels, (str, Path)):
        return dict(channels)
    table = _model_in(Path(channels)).get('channels')
    if not isinstance(table, dict):
        raise PruningError(f'{channels} is not the config of a pruned detector: its model has no '
                           'channel table')
    return plain_content(table)


def read_absent_blocks(channels: Union[ChannelTable, str, Path],
                       absent_blocks: Optional[AbsentBlocks]) -> AbsentBlocks:
    """Return the absent blocks of a :func:`PrunedDetector`, perhaps from where its channels are."""
    if absent_blocks is None and isinstance(channels, (str, Path)):
        absent_blocks = _model_in(Path(channels)).get('absent_blocks')
    return dict(absent_blocks or {})


def _model_in(path: Path) -> dict:
    """Return the model in the config of a pruned detector; a PruningError if there is no file."""
    if not path.is_file():
        raise PruningError(
            f'there is no {path}, which lists the channels of the pruned detector: '
            f'`python tools/prune.py CONFIG CHECKPOINT --work-dir {path.parent}` writes it')
    return load_config(str(path)).model


def drop_hooks(cfg: Config) -> List[str]:
    """Remove the hooks for sparse training from a config, in place; return their types.

    In the training of a pruned detector they would go on pressing the channels that stay.
    """
    hooks = cfg.get('custom_hooks') or []
    dropped = [hook for hook in hooks if _hook_type(hook) == SPARSITY_HOOK]
    if dropped:
        cfg.custom_hooks = [hook for hook in hooks if hook not in dropped]
    return [_hook_type(hook) for hook in dropped]


def _hook_type(hook: Any) -> str:
    """Return the name of a hook's class, without its scope."""
    return type_name(hook.get('type') if isinstance(hook, dict) else type(hook))


def make_pruned_config(cfg: Config, detector: str, changed_channels: ChannelTable,
                       absent_blocks: Optional[AbsentBlocks] = None) -> Config:
    """Make the config of a pruned detector from that of the original, perhaps pruned already.

    It is complete, with every base merged, and loads the ``pruned.pth`` beside it. Everything
    under ``model`` stays where it was, so that children of either config override the same
    places. The detector is its class, as :func:`registered_name` names it. Layers of absent
    blocks are not in its channel table.
    """
    content = plain_content(cfg)
    model = content.pop('model')
    if type_name(model['type']) == type_name(PRUNED_DETECTOR):
        absent_blocks = {**read_absent_blocks(model['channels'], model.get('absent_blocks')),
                         **(absent_blocks or {})}
        changed_channels = merged_tables(read_channel_table(model['channels']), changed_channels)
    channels = without_blocks(changed_channels, absent_blocks or {})
    model.update(type=PRUNED_DETECTOR, detector=detector, channels=channels)
    if absent_blocks:
        model['absent_blocks'] = absent_blocks
    if _numbers_of_classes(model):
        model.setdefault('original_classes', _numbers_of_classes(model))
    drop_pretrained(model)
    content['model'] = model
    imports = content.get('custom_imports', {}).get('imports', [])
    content['custom_imports'] = dict(
        imports=list(dict.fromkeys([*([imports] if isinstance(imports, str) else imports),
                                    'mmgcp'])),
        allow_failed_imports=False)
    content.update(load_from=CHECKPOINT, resume=False)
    content.pop('work_dir', None)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        drop_collate_scope(content.get(name) or {})
    return Config(content)


def _numbers_of_classes(model: dict) -> List[int]:
    """List the different numbers of classes in any part of a detector's config."""
    return sorted({part['num_classes'] for part in nested_dicts(model)
                   if isinstance(part.get('num_classes'), int)})


def check_channels(content: dict) -> None:
    """Raise a PruningError if a pruned detector in a part of a config has no channel table."""
    for part in nested_dicts(content):
        if part.get('type') == PRUNED_DETECTOR and 'channels' in part:
            read_channel_table(part['channels'])


def check_written(folder: Path) -> None:
    """Raise a PruningError unless the pruned detector can be built and loaded from its files."""
    try:
        rebuilt = build_detector(load_config(str(folder / 'pruned.py')))
        load_strictly(rebuilt, str(folder / 'pruned.pth'), 'its config')
    except UserError as error:
        raise PruningError('nothing has been written, as nobody could use the pruned detector: '
                           f'{error}') from error

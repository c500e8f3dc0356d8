# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Pruned detectors: ordinary ones, reduced to the channels that a table lists; their configs."""
import copy
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT
from mmyolo.registry import MODELS as MMYOLO_MODELS
from torch import Tensor

from mmgcp.errors import PruningError, UserError
from mmgcp.nn.layers import Layer, channel_counts, has_channels, is_depthwise, keep_channels
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

from .attributes import refresh_attributes

ChannelTable = Dict[str, List[Optional[int]]]
PRUNED_DETECTOR = 'mmgcp.PrunedDetector'
SPARSITY_HOOK = 'DynamicSparsityHook'
CHECKPOINT = '{{ fileDirname }}/pruned.pth'  # MMEngine fills in the folder of the config file


@MODELS.register_module()
@checked(PruningError, detector=TYPE, channels=either(
    PATH, MAPPING, text='must be the channels by layer, or a file that has them'))
def PrunedDetector(detector: str, channels: Union[ChannelTable, str, Path],  # noqa: N802
                   original_classes: Optional[Sequence[int]] = None,
                   **kwargs: Any) -> nn.Module:
    """Build a pruned detector: an ordinary detector with fewer channels in some layers.

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
        **kwargs: The arguments of the original detector. Pretrained weights in any
            ``init_cfg`` are ignored, as they have the original's channels.

    Returns:
        nn.Module: The detector.

    Raises:
        PruningError: There is no such file, or the table does not fit the detector.
    """
    table = read_channel_table(channels)
    kwargs = copy.deepcopy(kwargs)
    drop_pretrained(kwargs)
    model = build_model(MMYOLO_MODELS, dict(type=detector, **kwargs), f'detector {detector!r}',
                        PruningError)
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
    path = Path(channels)
    if not path.is_file():
        raise PruningError(
            f'there is no {path}, which lists the channels of the pruned detector: '
            f'`python tools/prune.py CONFIG CHECKPOINT --work-dir {path.parent}` writes it')
    table = load_config(str(path)).model.get('channels')
    if not isinstance(table, dict):
        raise PruningError(f'{path} is not the config of a pruned detector: its model has no '
                           'channel table')
    return table.to_dict()


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
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    return str(getattr(kind, '__name__', kind)).split('.')[-1]


def make_pruned_config(cfg: Config, detector: str, changed_channels: ChannelTable) -> Config:
    """Make the config of a pruned detector from that of the original, perhaps pruned already.

    It is complete, with every base merged, and loads the ``pruned.pth`` beside it. Everything
    under ``model`` stays where it was, so that children of either config override the same
    places. The detector is its class, as :func:`registered_name` names it.
    """
    content = copy.deepcopy(cfg.to_dict())
    model = content.pop('model')
    if model['type'].split('.')[-1] == PRUNED_DETECTOR.split('.')[-1]:
        changed_channels = _merged(read_channel_table(model['channels']), changed_channels)
    model.update(type=PRUNED_DETECTOR, detector=detector, channels=changed_channels)
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


def changed_sides(before: ChannelTable, after: ChannelTable) -> ChannelTable:
    """List the layers whose channels differ, with None for the side on which they do not."""
    return {name: [new if new != old else None for old, new in zip(before[name], counts)]
            for name, counts in after.items() if counts != before[name]}


def _merged(first: ChannelTable, second: ChannelTable) -> ChannelTable:
    """Override a table, of which a pruned detector has been built, by what has changed since."""
    merged = dict(first)
    for name, counts in second.items():
        before = first.get(name, [None] * len(counts))
        merged[name] = [old if new is None else new for old, new in zip(before, counts)]
    return merged


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


def count_channels(model: nn.Module) -> ChannelTable:
    """List the channels of all layers of a model; see :func:`PrunedDetector`."""
    counts = {name: channel_counts(layer) for name, layer in _named_layers(model).items()}
    return {name: numbers for name, numbers in counts.items() if numbers}


def apply_channel_table(model: nn.Module, table: ChannelTable, widen: bool = False) -> None:
    """Reduce the layers of a model to their first channels, as many as a table says.

    Args:
        model (nn.Module): The model as its config builds it, changed in place.
        table (dict[str, list[int | None]]): See :func:`PrunedDetector`.
        widen (bool): Whether layers that have too few channels get more, which are copies.
            Defaults to False.

    Raises:
        PruningError: A layer is missing, of another kind, or has too few channels;
            nothing has been changed.
    """
    layers = _named_layers(model)
    wanted = {}
    for name, counts in table.items():
        if name not in layers:
            raise PruningError(f'the channel table names {name!r}, which the detector does not '
                               'have: is it the architecture that was pruned?')
        wanted[name] = _filled(counts, layers[name])
        if not _can_have(layers[name], wanted[name], widen):
            present, groups = channel_counts(layers[name]), _num_groups(layers[name])
            raise PruningError(f'the channel table asks for {list(counts)} channels in {name!r}, '
                               f'but the detector has {present} there'
                               + (f' in {groups} groups' if groups > 1 else ''))
    for name, counts in wanted.items():
        for side, keep in _kept(layers[name], counts):
            keep_channels(model, name, side, keep)
    refresh_attributes(model)


def _filled(counts: Sequence[Optional[int]], layer: Layer) -> List[int]:
    """Replace None in the numbers of a table by what a layer has on that side."""
    present = channel_counts(layer)
    if len(present) != len(counts):
        return list(counts)
    return [there if count is None else count for count, there in zip(counts, present)]


def _named_layers(model: nn.Module) -> Dict[str, Layer]:
    """Return the modules of a model, and the parameters that belong to no layer with channels."""
    layers: Dict[str, Layer] = dict(model.named_modules())
    owned = {parameter for layer in layers.values() if channel_counts(layer)
             for parameter in layer.parameters()}
    layers.update((name, parameter) for name, parameter in model.named_parameters()
                  if parameter not in owned and has_channels(parameter))
    return layers


def _num_groups(layer: Layer) -> int:
    return getattr(layer, 'groups', getattr(layer, 'num_groups', 1))


def _can_have(layer: Layer, counts: List[int], widen: bool) -> bool:
    """Whether a layer can be reduced to these numbers of channels, or widened to them."""
    present = channel_counts(layer)
    if len(present) != len(counts) or not all(
            isinstance(a, int) and a > 0 and (widen or a <= b) for a, b in zip(counts, present)):
        return False
    if is_depthwise(layer):
        return counts[0] == counts[1]
    if isinstance(layer, nn.GroupNorm):  # only whole groups can go
        return counts[0] % (layer.num_channels // layer.num_groups) == 0
    return all(count % _num_groups(layer) == 0 for count in counts)


def _kept(layer: Layer, counts: List[int]) -> Iterator[Tuple[str, Tensor]]:
    """Yield the channels that stay on each side: the first ones, of each group; then copies."""
    present = channel_counts(layer)
    if len(counts) == 1 or is_depthwise(layer):
        yield 'out', torch.arange(counts[-1]) % present[-1]
        return
    for side, count, there in zip(('in', 'out'), counts, present):
        channels = torch.arange(there).view(_num_groups(layer), -1)
        chosen = torch.arange(count // len(channels)) % channels.shape[1]
        yield side, channels[:, chosen].flatten()

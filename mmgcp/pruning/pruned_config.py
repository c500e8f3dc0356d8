# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The config of a pruned detector."""
import copy
from typing import Dict, List

from mmengine.config import Config

from mmgcp.utils.config import drop_collate_scope

from .detector import ChannelTable

# MMEngine fills in the folder of the config file
CHECKPOINT = '{{ fileDirname }}/pruned.pth'


def make_pruned_config(cfg: Config, package: str, changed_channels: ChannelTable) -> Config:
    """Make the config of a pruned detector from that of the original.

    It is complete, with all bases merged. Everything under ``model`` stays where it was, so that
    configs that inherit from it can override the same settings.

    Args:
        cfg (Config): The config of the original.
        package (str): Package of the detector's class, for example ``'mmyolo'``.
        changed_channels (dict[str, list[int]]): The channels left in each pruned layer: [in, out],
            or [features] for layers with one count.

    Returns:
        Config: The config. It loads ``pruned.pth`` from its own folder.
    """
    content: Dict = copy.deepcopy(cfg.to_dict())
    model = content.pop('model')
    if model['type'].split('.')[-1] == 'PrunedDetector':  # pruned before
        changed_channels = {**model['channels'], **changed_channels}
    else:
        model['detector'] = f'{package}.{model["type"].split(".")[-1]}'
    model.update(type='mmgcp.PrunedDetector', channels=changed_channels)
    _drop_pretrained(model)
    content['model'] = model
    imports: List[str] = content.get('custom_imports', {}).get('imports', [])
    content['custom_imports'] = dict(
        imports=list(dict.fromkeys([*([imports] if isinstance(imports, str) else imports),
                                    'mmgcp'])),
        allow_failed_imports=False)
    content.update(load_from=CHECKPOINT, resume=False)
    content.pop('work_dir', None)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        drop_collate_scope(content.get(name) or {})
    return Config(content)


def _drop_pretrained(content) -> None:
    """Remove initialisations from pretrained checkpoints, which have the original channels."""
    if isinstance(content, dict):
        init_cfg = content.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            del content['init_cfg']
        for value in content.values():
            _drop_pretrained(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            _drop_pretrained(value)

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy

from mmengine.config import Config

from mmgcp.utils.config import drop_collate_scope

from .detector import PRUNED_DETECTOR, ChannelTable, drop_pretrained, read_channel_table

# MMEngine fills in the folder of the config file
CHECKPOINT = '{{ fileDirname }}/pruned.pth'


def make_pruned_config(cfg: Config, package: str, changed_channels: ChannelTable) -> Config:
    """Make the config of a pruned detector from that of the original, perhaps pruned already.

    It is complete, with every base merged, and loads the ``pruned.pth`` beside it. Everything
    under ``model`` stays where it was, so that children of either config override the same
    places. The package is that of the detector's class, such as ``'mmyolo'``.
    """
    content = copy.deepcopy(cfg.to_dict())
    model = content.pop('model')
    original = model['type']
    if original.split('.')[-1] == PRUNED_DETECTOR.split('.')[-1]:
        original = model['detector']
        changed_channels = {**read_channel_table(model['channels']), **changed_channels}
    model.update(type=PRUNED_DETECTOR, detector=f'{package}.{original.split(".")[-1]}',
                 channels=changed_channels)
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

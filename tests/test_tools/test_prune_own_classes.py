# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Detectors whose class is the user's, in a package of theirs; new-style configs."""
import json

import pytest
import torch
from mmengine.config import Config
from scripts import complaint, pruned_weights, run_here, write_pruning_files
from yolov4_samples import config_text

from mmgcp.utils.config import build_detector, load_config

REGISTRIES = {
    'mmyolo': 'from mmyolo.registry import MODELS',
    'mmengine': 'from mmengine.registry import MODELS',
    'own': 'from mmengine.registry import MODELS as ROOT, Registry\n'
           "MODELS = Registry('model', parent=ROOT, scope='{package}')",
}
NEW_STYLE = """
from mmengine.model.weight_init import KaimingInit, PretrainedInit
from mmdet.models import DetDataPreprocessor
from mmyolo.models import (YOLODetector, YOLOv8CSPDarknet, YOLOv8Head, YOLOv8HeadModule,
                           YOLOv8PAFPN)
default_scope = 'mmyolo'
layers = dict(widen_factor=0.125, norm_cfg=dict(type='BN'), act_cfg=dict(type='SiLU'))
model = dict(
    type=YOLODetector, data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=YOLOv8CSPDarknet, deepen_factor=0.33, last_stage_out_channels=512,
                  init_cfg=[dict(type=PretrainedInit, checkpoint='nowhere.pth'),
                            dict(type=KaimingInit, layer='Conv2d')], **layers),
    neck=dict(type=YOLOv8PAFPN, deepen_factor=0.33, in_channels=[256, 512, 512],
              out_channels=[256, 512, 512],
              init_cfg=dict(type=PretrainedInit, checkpoint='nowhere.pth'), **layers),
    bbox_head=dict(type=YOLOv8Head, head_module=dict(
        type=YOLOv8HeadModule, num_classes=3, in_channels=[256, 512, 512], **layers)))
"""


def write_package(folder, package, registry):
    """A package whose detector is two folders down, and a config of it."""
    models = folder / package / 'models'
    models.mkdir(parents=True)
    (folder / package / '__init__.py').write_text('')
    (models / '__init__.py').write_text(f'from .det import {package.title()}\n')
    (models / 'det.py').write_text(
        f'from mmyolo.models import YOLODetector\n{REGISTRIES[registry]}\n\n\n'
        f'@MODELS.register_module()\nclass {package.title()}(YOLODetector):\n    pass\n'.format(
            package=package))
    kind = f'{package}.{package.title()}' if registry == 'own' else package.title()
    config = folder / f'{package}.py'
    config.write_text(config_text() + (
        f"custom_imports = dict(imports=['mmgcp', '{package}.models'])\n"
        f"model.update(type='{kind}')\n"))
    return config


def prune(config, checkpoint, out):
    return run_here('prune.py', config, checkpoint, '--work-dir', out, '--target-params', 0.6,
                    '--calib-batches', 0)


@pytest.mark.parametrize('registry', REGISTRIES)
def test_class_in_a_nested_package(registry, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    package = f'users{registry}'
    files = write_pruning_files(write_package(tmp_path, package, registry))
    result = prune(*files, tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    cfg = Config.fromfile(tmp_path / 'out/pruned.py')
    scope = package if registry == 'own' else registry
    assert cfg.model.detector == f'{scope}.{package.title()}'
    model = build_detector(cfg)
    assert type(model).__module__ == f'{package}.models.det'
    model.load_state_dict(pruned_weights(tmp_path / 'out'), strict=True)
    report = json.loads((tmp_path / 'out/report.json').read_text())
    assert sum(param.numel() for param in model.parameters()) == report['params']['after']


@pytest.mark.yapf
def test_new_style_config(tmp_path):
    """Its types are classes; initialisations from checkpoints are dropped from lists, too."""
    pytest.importorskip('mmengine.config.lazy')
    files = write_pruning_files(tmp_path / 'new.py', NEW_STYLE)
    result = prune(*files, tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    cfg = load_config(str(tmp_path / 'out/pruned.py'))
    assert 'nowhere.pth' not in cfg.pretty_text and 'init_cfg' not in cfg.model.neck
    assert [part.type.split('.')[-1] for part in cfg.model.backbone.init_cfg] == ['KaimingInit']
    model = build_detector(cfg)
    model.load_state_dict(pruned_weights(tmp_path / 'out'), strict=True)
    model.init_weights()


def test_nothing_is_written_that_cannot_be_built(tmp_path, monkeypatch):
    """A detector that is what its config says only because of something in this process."""
    from mmgcp.pipeline import pruned_files as module
    files = write_pruning_files(tmp_path / 'plain.py', config_text())
    original = module.make_pruned_config

    def misleading(cfg, name, *tables):
        return original(cfg, name.replace('YOLODetector', 'Absent'), *tables)

    monkeypatch.setattr(module, 'make_pruned_config', misleading)
    said = complaint(prune(*files, tmp_path / 'out'))
    assert 'nothing has been written' in said and 'Absent is not in the' in said
    assert not (tmp_path / 'out').exists()
    assert {path.name for path in tmp_path.iterdir()} == {'plain.py', 'plain.pth'}
    assert torch.load(str(files[1]))['meta'] == {}

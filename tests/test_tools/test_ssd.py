# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The small SSD goes the whole way with the tools: train, prune, test."""
import json
import re
import shutil

import pytest
import torch
from mmengine.registry import DefaultScope
from scripts import ROOT, run_process

from mmgcp.attention import find_attention
from mmgcp.datasets.demo import CLASSES
from mmgcp.registry import MODELS
from mmgcp.sparsity.selection import select_scale_factors
from mmgcp.utils.config import load_config

CONFIG = ROOT / 'configs/ssd/ssd300_r18-half_1xb8-80e_voc.py'
CHILD = f"""
_base_ = '{CONFIG}'
data = dict(data_root={{data_root!r}}, metainfo=dict(classes={CLASSES!r}))
loader = dict(batch_size=3, num_workers=0, persistent_workers=False, dataset=data)
train_dataloader = loader
val_dataloader = loader
test_dataloader = loader
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=(16, 32), out_channels=(16, 32, 16, 16, 16, 16)),
    bbox_head=dict(in_channels=(16, 32, 16, 16, 16, 16), num_classes={len(CLASSES)}))
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(interval=1))
"""


def small_config(tmp_path, root):
    """Write a config of the detector, narrow, for data in a folder."""
    config = tmp_path / 'ssd.py'
    config.write_text(CHILD.format(data_root=str(root)))
    return config


def small_model(tmp_path):
    return load_config(str(small_config(tmp_path, tmp_path))).model


def build(config):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(config)


def test_attention_finds_its_places_in_a_detector_for_large_images(tmp_path):
    config = small_model(tmp_path)
    config.update(detector_type=config.type, type='mmgcp.SCADetector')
    model = build(config)
    assert len(find_attention(model).producers) >= 15
    levels = model(torch.rand(2, 3, 300, 300), mode='tensor')[0]
    assert levels[-1].shape[2:] == (1, 1)  # where there are no places to standardise over
    assert all(bool(level.isfinite().all()) for level in levels)


def test_sparse_training_finds_its_groups_in_a_detector_for_large_images(tmp_path):
    model = build(small_model(tmp_path))
    factors = select_scale_factors(model, modules='prunable', coupled=True, groups='auto')
    assert {'backbone-8', 'bottom-up-64'} <= {layer.group for layer in factors.layers}


def degenerate(root):
    """Add a box without width to an annotation, as real data have them."""
    path = sorted((root / 'Annotations').glob('*.xml'))[0]
    text = path.read_text()
    broken = re.search(r'\t<object>.*?</object>\n', text, re.S).group()
    left = re.search(r'<xmin>(.*?)</xmin>', broken).group(1)
    broken = re.sub(r'<xmax>.*?</xmax>', f'<xmax>{left}</xmax>', broken)
    path.write_text(text.replace('</annotation>', f'{broken}</annotation>'))


@pytest.mark.slow
def test_train_prune_test(demo_root, tmp_path):
    root = tmp_path / 'data'
    shutil.copytree(str(demo_root), str(root))
    degenerate(root)
    config = small_config(tmp_path, root)
    trained = run_process('train.py', config, '--work-dir', tmp_path / 'run', cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-3000:]
    losses = re.findall(r' loss: (\S+)', trained.stdout + trained.stderr)
    assert losses and all(0 < float(loss) < 1000 for loss in losses)  # not NaN
    assert re.search(r'Epoch\(val\) \[1\].*pascal_voc/AP50: ', trained.stdout + trained.stderr)

    pruned = run_process('prune.py', config, tmp_path / 'run/epoch_1.pth', '--work-dir',
                         tmp_path / 'pruned', '--target-flops', 0.5, '--calib-batches', 1,
                         '--criterion', 'Taylor', cwd=tmp_path)
    assert pruned.returncode == 0, pruned.stderr[-3000:]
    report = json.loads((tmp_path / 'pruned/report.json').read_text())
    assert abs(report['macs']['after'] / report['macs']['before'] - 0.5) < 0.01
    state = torch.load(str(tmp_path / 'pruned/pruned.pth'), weights_only=False)['state_dict']
    assert all(bool(value.isfinite().all()) for value in state.values())
    tested = run_process('test.py', tmp_path / 'pruned/pruned.py', tmp_path / 'pruned/pruned.pth',
                         '--work-dir', tmp_path / 'test', cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr[-3000:]
    assert 'pascal_voc/AP50' in tested.stdout + tested.stderr

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""The benchmark of spatial pruning on small images."""
import re

import pytest
import torch
from spatial_samples import build, p2_config

from mmgcp.datasets.demo import CLASSES
from mmgcp.utils.config import load_config


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark('spatial_pruning.py')


def test_times(benchmark, capsys):
    benchmark('--detectors', 'yolov5', '--size', 128, '--runs', 1, '--shares', 0.5, 1)
    text = capsys.readouterr().out
    rows = re.findall(r'^\| ([^|]+?) +\| +([\d.]+) \| +([\d.]+) \|', text, re.M)
    assert [row[0] for row in rows] == [
        'dense', '50%', '100%', 'strides 8 to 32', 'strides 4 to 32, dense', 'pruned, 50%',
        'pruned, 100%']
    assert all(float(time) > 0 for _, time, _ in rows)


def test_tiles_are_those_that_are_said(benchmark):
    """What keep_random_tiles asks for is what is computed."""
    module = benchmark.module
    model = build(load_config(str(module.ROOT / 'configs' / module.CONFIGS['yolov4'][2])))
    inference = module.find_inference(model)
    for share, expected in ((0.25, 1 / 4), (0.5, 2 / 4), (1., 1.)):
        module.keep_random_tiles(inference, share)
        with torch.no_grad(), inference.pruning():
            model(torch.rand(1, 3, 128, 128, dtype=torch.double), mode='tensor')
        assert inference.computed[4] == inference.kept[4] == expected


@pytest.mark.slow
def test_by_tau(benchmark, demo_root, tmp_path, capsys):
    """A dense detector gets masks, which are fitted; tau 1 drops nothing."""
    cfg = p2_config('yolov4')
    for name in ('train', 'val'):
        dataset = cfg[f'{name}_dataloader'].dataset
        dataset.data_root = str(demo_root)
        dataset.metainfo = dict(classes=CLASSES)
        cfg[f'{name}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.model.bbox_head.head_module.num_classes = len(CLASSES)
    cfg.test_dataloader, cfg.load_from = cfg.val_dataloader, None
    cfg.dump(str(tmp_path / 'cfg.py'))
    torch.save(dict(state_dict=build(cfg).float().state_dict(), meta={}), tmp_path / 'a.pth')
    benchmark('--config', tmp_path / 'cfg.py', '--checkpoint', tmp_path / 'a.pth', '--size', 96,
              '--fit-masks', 2, '--taus', 0, 1, '--levels', 4, 8)
    text = capsys.readouterr().out
    assert 'the mask convolutions spatial_masks.8, spatial_masks.16 are not in' in text
    (none, everything) = re.findall(r'^\| ([01]) +\| +[\d.]+ \| +([\d.]+)% \| +([\d.]+)% \|', text,
                                    re.M)
    assert none == ('0', '0.0', '0.0') and everything == ('1', '100.0', '100.0')

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""A small data set in VOC's format, a small detector for it, and the tools in processes."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / 'configs' / 'yolov4' / 'yolov4_n_fast_1xb8-60e_voc-320.py'

TINY_CONFIG = """
_base_ = {base!r}
data_root = {data_root!r}
img_scale = (96, 96)
max_epochs = 1
sparse_epochs = 1
distill_epochs = 1
metainfo = dict(classes={classes!r})
factors = dict(deepen_factor=0.33, widen_factor={widen_factor})
model = dict(
    backbone=factors, neck=factors,
    bbox_head=dict(
        head_module=dict(num_classes={num_classes}, widen_factor=factors['widen_factor'])))
affine = dict(type='YOLOv5RandomAffine', max_rotate_degree=0., max_shear_degree=0.,
              scaling_ratio_range=(0.5, 1.5), border=(-48, -48), border_val=(114, 114, 114))
train_pipeline = [
    *_base_.pre_transform,
    dict(type='Mosaic', img_scale=img_scale, pad_val=114.0, pre_transform=_base_.pre_transform),
    affine, *_base_.train_pipeline[-3:]
]
test_pipeline = [
    _base_.test_pipeline[0],
    dict(type='YOLOv5KeepRatioResize', scale=img_scale),
    dict(type='LetterResize', scale=img_scale, allow_scale_up=False, pad_val=dict(img=114)),
    *_base_.test_pipeline[-2:]
]
loader = dict(batch_size=4, num_workers=0, persistent_workers=False)
data = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **data), **loader)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data), **loader)
test_dataloader = val_dataloader
default_hooks = dict(
    param_scheduler=dict(max_epochs=max_epochs),
    checkpoint=dict(interval=1, save_best=None), logger=dict(interval=1))
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
"""


@pytest.fixture(scope='session')
def demo_root(tmp_path_factory):
    """Eight images of 128 pixels: six in trainval and two in test."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    make_demo_dataset(root, DemoOptions(num_train=4, num_val=2, num_test=2, size=128, seed=3))
    return root


@pytest.fixture(scope='session')
def write_config(demo_root):
    """A function that writes the config of a tiny detector on 96 pixels."""

    def write(path, data_root=demo_root, classes=CLASSES, widen_factor=0.125):
        path.write_text(TINY_CONFIG.format(
            base=str(BASE), data_root=str(data_root), classes=tuple(classes),
            num_classes=len(classes), widen_factor=widen_factor))
        return path

    return write


@pytest.fixture(scope='session')
def run_process():
    """A function that runs a tool in a process of its own."""

    def run(tool, *arguments, cwd):
        return subprocess.run(
            [sys.executable, str(ROOT / 'tools' / tool), *map(str, arguments)], cwd=str(cwd),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=dict(os.environ, PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1'))

    return run


@pytest.fixture
def exit_message(monkeypatch, tmp_path):
    """A function that runs a tool in this process until it gives up and returns why."""

    def run(tool, *arguments):
        path = ROOT / 'tools' / tool
        spec = importlib.util.spec_from_file_location(f'tool_{path.stem}', str(path))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('LOCAL_RANK', '0')
        monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            module.run_tool(module.main)
        assert isinstance(caught.value.code, str)  # printed to stderr, status 1
        return caught.value.code

    return run


@pytest.fixture(scope='session')
def trained(tmp_path_factory, write_config, run_process):
    """A detector trained for one epoch: config, work_dir and output."""
    folder = tmp_path_factory.mktemp('trained')
    config = write_config(folder / 'tiny.py')
    result = run_process('train.py', config, '--work-dir', folder / 'run', cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(config=config, work_dir=folder / 'run', output=result.stdout + result.stderr)


@pytest.fixture
def assert_one_sentence():
    """A function that checks the end of a tool that was given something wrong."""

    def check(result, tool):
        assert result.returncode == 1
        assert 'Traceback' not in result.stdout + result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f'{tool}: ')
        return last

    return check

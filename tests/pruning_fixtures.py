# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import warnings

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmyolo.utils import register_all_modules
from pruning_samples import YOLOV4_CONFIG, Toy, build, randomise, run_prune_tool, yolov4

from mmgcp.pruning.graph import find_units
from mmgcp.utils.config import build_detector


@pytest.fixture(autouse=True, scope='session')
def scope():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        register_all_modules()


@pytest.fixture(scope='session')
def original(scope):
    """A small YOLOv4 with its channel units and skipped layers; not to be changed."""
    model = build(yolov4())
    return (model, *find_units(model))


@pytest.fixture
def model(original):
    return copy.deepcopy(original[0])


@pytest.fixture(scope='session')
def units(original):
    return original[1]


@pytest.fixture(scope='session')
def config_files(scope, tmp_path_factory):
    """Config file and checkpoint of a small YOLOv4."""
    folder = tmp_path_factory.mktemp('original')
    (folder / 'tiny.py').write_text(YOLOV4_CONFIG)
    model = randomise(build_detector(Config.fromfile(folder / 'tiny.py')))
    meta = dict(dataset_meta=dict(classes=('Platelets', 'RBC', 'WBC')))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'tiny.pth')
    return folder / 'tiny.py', folder / 'tiny.pth'


@pytest.fixture(scope='session')
def pruned_folder(config_files, tmp_path_factory):
    """What tools/prune.py writes for it."""
    folder = tmp_path_factory.mktemp('pruned') / 'out'
    assert run_prune_tool(*config_files, '--work-dir', folder, '--target-params', 0.4) == 0
    return folder


@pytest.fixture
def single():
    """A network of one convolution."""
    return Toy(lambda net, x: net.pred(x), pred=nn.Conv2d(3, 12, 1))

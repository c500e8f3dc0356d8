# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""What tests of several folders share; see yolov4_samples.py and scripts.py for functions."""
import copy
import gc
import warnings
from multiprocessing.pool import ThreadPool

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmyolo.utils import register_all_modules
from pruning_samples import Toy, randomise
from scripts import run_here
from yolov4_samples import build, config_text, config_text_with_data, yolov4

from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset
from mmgcp.pipeline.network_drawing import FILES as NETWORK_FILES
from mmgcp.pruning.graph import find_units
from mmgcp.utils.config import build_detector


@pytest.fixture(autouse=True, scope='session')
def modules():
    """All classes of MMDetection and MMYOLO, and a default scope for fixtures of modules.

    What is there by then stays: collections of garbage, as by each of MMEngine's data sets, need
    not look at it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        register_all_modules()
    gc.collect()
    gc.freeze()
    MMLogger.get_current_instance()  # or it would write to what the first test captures, later on


@pytest.fixture(autouse=True)
def scope(modules):
    """MMYOLO's default scope, whatever runners of other tests have left."""
    with DefaultScope.overwrite_default_scope('mmyolo'):
        yield


@pytest.fixture(autouse=True)
def configs_without_layout(request, monkeypatch):
    """Configs are written without yapf, which takes longer than pruning, unless marked with yapf.

    Processes and fixtures of modules write them with it.
    """
    if not request.node.get_closest_marker('yapf'):
        monkeypatch.setattr('mmengine.config.config.FormatCode',
                            lambda text, **settings: (text, True))


@pytest.fixture(autouse=True)
def blank_pictures(request, monkeypatch):
    """Pruned detectors come with blank pictures, because drawing takes longer than pruning.

    Unless the test is marked with pictures. Processes and fixtures of modules draw them.
    """
    if request.node.get_closest_marker('pictures'):
        return
    for name in ('plot_channels', 'plot_score_histograms'):
        monkeypatch.setattr(f'mmgcp.pruning.report.{name}', lambda *args: args[-1].write_bytes(b''))

    def draw_blank(folder):
        for name in NETWORK_FILES:
            (folder / name).write_bytes(b'')

    monkeypatch.setattr('mmgcp.pipeline.pruned_files.draw_network', draw_blank)


@pytest.fixture(autouse=True)
def threads_for_mean_precision(monkeypatch):
    """MMDetection's mAP starts four processes for each IoU threshold, of which each takes long."""
    monkeypatch.setattr('mmdet.evaluation.functional.mean_ap.Pool', ThreadPool)


@pytest.fixture(scope='session')
def original(modules):
    """A small YOLOv4 with its channel units and skipped layers; not to be changed."""
    model = build(yolov4())
    return (model, *find_units(model))


@pytest.fixture
def model(original):
    return copy.deepcopy(original[0])


@pytest.fixture(scope='session')
def units(original):
    return original[1]


@pytest.fixture
def single():
    """A network of one convolution."""
    return Toy(lambda net, x: net.pred(x), pred=nn.Conv2d(3, 12, 1))


@pytest.fixture(scope='session')
def config_files(modules, tmp_path_factory):
    """Config file and checkpoint of a small YOLOv4."""
    folder = tmp_path_factory.mktemp('original')
    (folder / 'tiny.py').write_text(config_text())
    model = randomise(build_detector(Config.fromfile(folder / 'tiny.py')))
    meta = dict(dataset_meta=dict(classes=('Platelets', 'RBC', 'WBC')), epoch=3)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / 'tiny.pth')
    return folder / 'tiny.py', folder / 'tiny.pth'


@pytest.fixture(scope='session')
def pruned_folder(config_files, tmp_path_factory):
    """What tools/prune.py writes for it."""
    folder = tmp_path_factory.mktemp('pruned') / 'out'
    result = run_here('prune.py', *config_files, '--work-dir', folder, '--target-params', 0.4)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope='session')
def demo_root(tmp_path_factory):
    """Eight images of 128 pixels: six in trainval and two in test."""
    root = tmp_path_factory.mktemp('data') / 'shapes'
    make_demo_dataset(root, DemoOptions(num_train=4, num_val=2, num_test=2, size=128, seed=3))
    return root


@pytest.fixture(scope='session')
def write_config(demo_root):
    """A function that writes the config of a tiny detector with data; see yolov4_samples.py."""

    def write(path, data_root=demo_root, classes=CLASSES, widen_factor=0.125):
        path.write_text(config_text_with_data(data_root, classes, widen_factor))
        return path

    return write

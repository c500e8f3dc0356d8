# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Training batches and validation of two processes, beside those of one."""
import pytest
import torch
import torch.nn as nn
from mmdet.models import BatchSyncRandomResize
from mmengine.dist import get_rank
from mmyolo.utils import register_all_modules
from ranks import on_ranks
from test_calibration import DEMO_CONFIG, mmdet_reader, yolo_reader
from yolov4_samples import build, yolov4

from mmgcp.datasets.calibration import CalibrationBatches, calibration_batches, evaluate
from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset
from mmgcp.utils.config import load_config

pytestmark = pytest.mark.slow
NUM_IMAGES = 10
CACHED_MOSAIC = dict(type='Mosaic', img_scale=(96, 96), use_cached=True, random_pop=True,
                     max_cached_images=6)


def demo_config(folder):
    cfg = load_config(str(DEMO_CONFIG))
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(folder / 'shapes')
        loader.batch_size = 2
        for transform in loader.dataset.pipeline:
            if 'scale' in transform:
                transform.scale = (96, 96)
    return cfg


def cached_config(folder):
    """Each mosaic has images of batches before."""
    cfg = demo_config(folder)
    names = [transform.type for transform in cfg.train_dataloader.dataset.pipeline]
    cfg.train_dataloader.dataset.pipeline.insert(
        names.index('LoadAnnotations') + 1, CACHED_MOSAIC)
    return cfg


def mmdet_config(folder):
    cfg = demo_config(folder)
    cfg.train_dataloader.collate_fn = dict(type='pseudo_collate')
    return cfg


def resizing_reader():
    """Draws a size after each second batch, which the first rank does for all."""
    model = mmdet_reader()
    resize = BatchSyncRandomResize((160, 320), interval=2, size_divisor=32)
    model.data_preprocessor.batch_augments = nn.ModuleList([resize])
    return model


def read(cfg, model, number=NUM_IMAGES):
    return [(batch.images, batch.data_samples['bboxes_labels'] if isinstance(
        batch.data_samples, dict) else [sample.img_path for sample in batch.data_samples])
        for batch in calibration_batches(cfg, model, number, batch_size=2)]


def seen(folder):
    """What a process sees."""
    register_all_modules()
    torch.manual_seed(get_rank())
    cfg, shown = demo_config(folder), []
    lengths = [len(CalibrationBatches(cfg, yolo_reader(), number)) for number in (0, 1, 4, 5)]
    detector = dict(yolov4(num_classes=len(CLASSES)), use_syncbn=False)
    detector['test_cfg'].update(nms_pre=3000, max_per_img=300)
    model = build(detector)
    return dict(
        plain=read(cfg, yolo_reader()), one=read(cfg, yolo_reader(), 1),
        cached=read(cached_config(folder), yolo_reader()),
        resized=read(mmdet_config(folder), resizing_reader()), lengths=lengths,
        metrics=[evaluate(model, cfg, 'pascal_voc/mAP', number,
                          lambda *steps: shown.append(steps)) for number in (None, 3)],
        progress=shown)


@pytest.fixture(scope='module')
def folder(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp('shared')
    make_demo_dataset(path / 'shapes', DemoOptions(num_train=8, num_val=2, num_test=5, size=128))
    return path


@pytest.fixture(scope='module')
def ranks(folder):
    return on_ranks(__file__, 'seen', folder)


@pytest.fixture(scope='module')
def alone(folder):
    return seen(folder)


@pytest.mark.parametrize('kind, number', [('plain', 5), ('one', 1), ('cached', 5), ('resized', 5)])
def test_batches_are_shared_out(kind, number, ranks, alone):
    assert len(alone[kind]) == number
    for rank, found in enumerate(ranks):
        expected = alone[kind][rank::2]
        assert len(found[kind]) == len(expected)
        for (images, truth), (own_images, own_truth) in zip(found[kind], expected):
            assert torch.equal(images, own_images)
            assert torch.equal(truth, own_truth) if kind != 'resized' else truth == own_truth


def test_sizes_vary(alone):
    """Or else the comparison shows little."""
    sizes = [images.shape[2] for images, _ in alone['resized']]
    assert sizes[0] == sizes[1] < 160 <= sizes[2] == sizes[3]


def test_lengths(ranks, alone):
    assert alone['lengths'] == [0, 1, 4, 5]
    assert [found['lengths'] for found in ranks] == [[0, 1, 2, 3], [0, 0, 2, 2]]


def test_validation_is_that_of_one_process(ranks, alone):
    assert all(0 < value < 1 for _, value in alone['metrics'])
    for found in ranks:
        assert found['metrics'] == alone['metrics']
    assert ranks[0]['progress'] == [(1, 3), (3, 3), (1, 2)]
    assert ranks[1]['progress'] == [(2, 3), (2, 2)]

# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import copy
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmdet.models import BatchSyncRandomResize, DetDataPreprocessor
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import InstanceData
from mmyolo.models import YOLOv5DetDataPreprocessor
from scripts import ROOT

from mmgcp.datasets import calibration
from mmgcp.datasets.calibration import CalibrationBatches, ImagesOf, calibration_batches, evaluate
from mmgcp.datasets.demo import CLASSES, DemoOptions, make_demo_dataset
from mmgcp.errors import UserError
from mmgcp.nn.training_loss import detection_loss, loss_mode
from mmgcp.utils.config import build_detector

DEMO_CONFIG = ROOT / 'configs/yolov4/yolov4_n_fast_1xb8-48e_demo-160.py'
INHERITED_CONFIG = """
_base_ = 'mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'
train_pipeline = [
    *_base_.pre_transform,
    dict(type='mmdet.Resize', scale=(64, 64)),
    dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path'))
]
train_dataloader = dict(
    collate_fn=_base_.train_dataloader.collate_fn,
    dataset=dict(
        _delete_=True, type='mmgcp.VOCFormatDataset', data_root={root!r},
        metainfo=dict(classes={classes!r}), ann_file='ImageSets/Main/train.txt',
        pipeline=train_pipeline))
"""
MMDET_PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(96, 96), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs')
]


def calibration_images(*args, **kwargs):
    return ImagesOf(calibration_batches(*args, **kwargs))


class Reader(nn.Module):
    """A model that reads images but detects what it has been told."""

    def __init__(self, data_preprocessor, answers=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 1)
        self.data_preprocessor = data_preprocessor
        self.answers = answers

    def val_step(self, data):
        assert not self.training and not torch.is_grad_enabled()
        samples = self.data_preprocessor(data, False)['data_samples']
        for sample in samples:
            truth = self.answers[sample.img_id]
            sample.pred_instances = InstanceData(
                bboxes=truth.bboxes.tensor, labels=truth.labels, scores=torch.ones(len(truth)))
        return samples


class CountingMetric(BaseMetric):
    """Counts the images."""

    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(images=len(results), classes=len(self.dataset_meta['classes']))


@pytest.fixture(scope='module')
def root(modules, tmp_path_factory):
    path = tmp_path_factory.mktemp('data') / 'shapes'
    make_demo_dataset(path, DemoOptions(num_train=5, num_val=1, num_test=3, size=128, seed=3))
    return str(path)


@pytest.fixture
def cfg(root):
    """YOLOv4 of the demo on 96 pixels."""
    cfg = Config.fromfile(DEMO_CONFIG)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = root
        for transform in loader.dataset.pipeline:
            if 'scale' in transform:
                transform.scale = (96, 96)
    cfg.val_evaluator.iou_thrs = [0.5, 0.75]
    return cfg


@pytest.fixture
def mmdet_cfg(root):
    """A config of MMDetection, of whose dimensions the images have several."""
    data = dict(
        type='mmgcp.VOCFormatDataset', data_root=root, metainfo=dict(classes=CLASSES))
    return Config(dict(
        default_scope='mmdet',
        train_dataloader=dict(
            batch_size=2, num_workers=2, persistent_workers=True, prefetch_factor=4,
            sampler=dict(type='DefaultSampler', shuffle=True),
            batch_sampler=dict(type='AspectRatioBatchSampler'),
            dataset=dict(ann_file='ImageSets/Main/trainval.txt', pipeline=MMDET_PIPELINE, **data))))


def mmdet_reader(**kwargs):
    return Reader(DetDataPreprocessor(
        mean=[10., 20., 30.], std=[50., 60., 70.], bgr_to_rgb=True, pad_size_divisor=32, **kwargs))


def yolo_reader(**kwargs):
    return Reader(YOLOv5DetDataPreprocessor(
        mean=[0.] * 3, std=[255.] * 3, bgr_to_rgb=True, **kwargs))


def equal(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_images_of_mmyolo(cfg):
    images = list(calibration_images(cfg, yolo_reader(), 9, batch_size=4))
    assert [image.shape for image in images] == [(4, 3, 96, 96), (2, 3, 96, 96)]
    assert all(image.dtype == torch.float32 for image in images)
    assert all(0 <= image.min() and 0.5 < image.max() <= 1 for image in images)
    assert len(torch.cat(images).unique(dim=0)) == 6
    assert len(list(calibration_images(cfg, yolo_reader(), 1, batch_size=4))) == 1
    assert list(calibration_images(cfg, yolo_reader(), 0)) == []


def test_images_of_the_demo_detector(cfg):
    model = build_detector(cfg)
    image, = calibration_images(cfg, model, 5)
    assert image.shape == (6, 3, 96, 96)  # of the config's 8
    assert image.max() <= 1


def test_images_of_mmdet(mmdet_cfg):
    images = list(calibration_images(mmdet_cfg, mmdet_reader(), 9, batch_size=8))
    assert sorted(len(image) for image in images) == [2, 2, 2]
    assert all(size % 32 == 0 for image in images for size in image.shape[2:])
    assert len({image.shape for image in images}) > 1
    assert all(image.min() < 0 < image.max() < 6 for image in images)


def test_config_inherited_from_a_package(root, tmp_path):
    (tmp_path / 'inherited.py').write_text(INHERITED_CONFIG.format(root=root, classes=CLASSES))
    cfg = Config.fromfile(tmp_path / 'inherited.py')
    assert '_scope_' in cfg.train_dataloader.collate_fn  # or else this test shows nothing
    before = copy.deepcopy(cfg.to_dict())
    image, = calibration_images(cfg, yolo_reader(), 1, batch_size=3)
    assert len(image) == 3
    assert cfg.to_dict() == before


def test_precision_of_the_model(cfg):
    image, = calibration_images(cfg, yolo_reader().double(), 1)
    assert image.dtype == torch.float64


def test_images_that_are_not_normalised(cfg):
    image, = calibration_images(cfg, Reader(YOLOv5DetDataPreprocessor()), 1)
    assert image.dtype == torch.float32 and image.max() > 100


def test_images_are_reproducible(cfg, mmdet_cfg):
    for config, reader in ((cfg, yolo_reader), (mmdet_cfg, mmdet_reader)):
        first = list(calibration_images(config, reader(), 3, batch_size=2))
        random.seed(99)
        np.random.seed(99)
        torch.manual_seed(99)
        assert equal(first, list(calibration_images(config, reader(), 3, batch_size=2)))


def test_nothing_around_changes(cfg):
    model = yolo_reader()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    hub = MessageHub.get_current_instance()
    iteration = hub.get_info('iter')
    for _ in calibration_images(cfg, model, 1):
        assert hub.get_info('iter') == iteration
        assert DefaultScope.get_current_instance().scope_name == 'mmyolo'
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()
    assert torch.equal(states[2], torch.get_rng_state())


def test_batch_augmentation_of_another_size(mmdet_cfg):
    # it asks for the iteration, of which there is none outside of training
    model = mmdet_reader()
    resize = BatchSyncRandomResize((160, 320), interval=1, size_divisor=32)
    model.data_preprocessor.batch_augments = nn.ModuleList([resize])
    before = dict(vars(resize))
    first = list(calibration_images(mmdet_cfg, model, 3))
    assert min(image.shape[2] for image in first[1:]) >= 160 > first[0].shape[2]
    random.seed(7)
    assert equal(first, list(calibration_images(mmdet_cfg, model, 3)))
    assert vars(resize) == before


def fit(corners, width, height):
    """Whether boxes are proper ones within an image."""
    inside = (corners[:, :2] >= 0).all() and (corners[:, 2:] <= torch.tensor([width, height])).all()
    return bool(inside) and bool((corners[:, 2:] > corners[:, :2]).all())


def test_batches_of_mmyolo(cfg):
    batches = list(calibration_batches(cfg, yolo_reader(), 9, batch_size=4))
    assert [len(batch.images) for batch in batches] == [4, 2]
    for batch in batches:
        boxes = batch.data_samples['bboxes_labels']
        assert boxes.shape[1] == 6 and len(boxes) >= len(batch.images)
        assert set(boxes[:, 0].tolist()) == set(range(len(batch.images)))
        assert set(boxes[:, 1].tolist()) <= set(range(len(CLASSES)))
        assert fit(boxes[:, 2:], 96, 96)
        assert len(batch.data_samples['img_metas']) == len(batch.images)


def test_batches_of_mmdet(mmdet_cfg):
    batches = list(calibration_batches(mmdet_cfg, mmdet_reader(), 9, batch_size=8))
    assert len(batches) == 3
    for images, samples in batches:
        assert len(samples) == len(images)
        for sample in samples:
            height, width = sample.img_shape
            truth = sample.gt_instances
            assert len(truth) > 0 and height <= images.shape[2] and width <= images.shape[3]
            assert fit(truth.bboxes, width, height)
            assert sample.batch_input_shape == tuple(images.shape[2:])


def test_ground_truth_belongs_to_the_images(mmdet_cfg):
    """Also after flipping and resizing: the shapes differ from what is around them."""
    (images, samples), *_ = calibration_batches(mmdet_cfg, mmdet_reader(), 1)
    image, sample = images[0], samples[0]
    scale = sample.scale_factor[0]
    with open(f'{mmdet_cfg.train_dataloader.dataset.data_root}/Annotations/'
              f'{Path(sample.img_path).stem}.xml') as file:
        corners = [[float(value) for value in re.findall(rf'<{name}>([0-9.]+)<', text)]
                   for text in [file.read()] for name in ('xmin', 'ymin', 'xmax', 'ymax')]
    truth = torch.tensor(corners).t()
    width, height = sample.img_shape[1], sample.img_shape[0]
    found = sample.gt_instances.bboxes
    assert image.shape[1] >= height
    sizes, expected = found[:, 2:] - found[:, :2], (truth[:, 2:] - truth[:, :2]) * scale
    assert torch.allclose(sizes.sort(0).values, expected.sort(0).values, atol=2 * scale)
    assert fit(found, width, height)


def test_batches_are_reproducible(cfg, mmdet_cfg):
    first, second = (list(calibration_batches(cfg, yolo_reader(), 3, batch_size=2))
                     for _ in range(2))
    for one, other in zip(first, second):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.data_samples['bboxes_labels'], other.data_samples['bboxes_labels'])
    first, second = (list(calibration_batches(mmdet_cfg, mmdet_reader(), 3)) for _ in range(2))
    for one, other in zip(first, second):
        assert torch.equal(one.images, other.images)
        for sample, again in zip(one.data_samples, other.data_samples):
            assert sample.img_path == again.img_path
            assert torch.equal(sample.gt_instances.bboxes, again.gt_instances.bboxes)


def test_images_are_those_of_the_batches(cfg):
    batches = list(calibration_batches(cfg, yolo_reader(), 3, batch_size=2))
    assert len(batches) == 3
    assert equal([batch.images for batch in batches],
                 list(calibration_images(cfg, yolo_reader(), 3, batch_size=2)))


@pytest.mark.parametrize('limit, loadings', [
    (None, 1), (2 * 2 * 3 * 96**2 * 4, 1), (2 * 2 * 3 * 96**2 * 4 - 1, 4), (0, 4)])
def test_batches_to_go_through_several_times(cfg, monkeypatch, limit, loadings):
    """They are loaded anew only if they do not fit into memory."""
    calls = []

    def load(*arguments):
        calls.append(arguments)
        return calibration_batches(*arguments)

    monkeypatch.setattr(calibration, 'calibration_batches', load)
    if limit is not None:
        monkeypatch.setattr(calibration, 'CACHE_BYTES', limit)
    batches = CalibrationBatches(cfg, yolo_reader(), 2, batch_size=2)
    assert len(batches) == 2
    next(iter(batches))  # not to the end
    calls.clear()
    first, second = list(batches), list(ImagesOf(batches))
    assert len(first) == 2 and first[0].images.shape == (2, 3, 96, 96)
    assert equal([batch.images for batch in first], second)
    both = zip(batches, batches)  # at the same time
    assert sum(1 for _ in both) == 2
    assert len(calls) == loadings


def test_loss_on_batches(cfg):
    """A detector takes them as they are."""
    model = build_detector(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = []
    for _ in range(2):
        with loss_mode(model):
            losses += [float(detection_loss(model, batch))
                       for batch in CalibrationBatches(cfg, model, 2, batch_size=3)]
    assert losses[:2] == losses[2:] and losses[0] != losses[1]
    assert all(0 < loss < 1e4 for loss in losses)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_data(cfg):
    cfg.train_dataloader.dataset.data_root = '/nowhere'
    with pytest.raises(UserError) as caught:
        list(calibration_images(cfg, yolo_reader(), 1))
    message = str(caught.value)
    assert message.startswith('the calibration images cannot be loaded: FileNotFoundError: ')
    assert '/nowhere' in message and '\n' not in message


def test_missing_image(cfg, root, tmp_path):
    shutil.copytree(root, tmp_path / 'data')
    (tmp_path / 'data/JPEGImages/000002.jpg').unlink()
    cfg.train_dataloader.dataset.data_root = str(tmp_path / 'data')
    with pytest.raises(UserError, match='^the calibration images cannot be loaded: .*000002.jpg'):
        list(calibration_images(cfg, yolo_reader(), 1))


def test_config_without_data(cfg):
    for name in ('train_dataloader', 'val_dataloader', 'val_evaluator'):
        cfg.pop(name)
    with pytest.raises(UserError, match='the config has no train_dataloader'):
        list(calibration_images(cfg, yolo_reader(), 1))
    with pytest.raises(UserError, match='the config has no val_dataloader'):
        evaluate(yolo_reader(), cfg)


@pytest.fixture
def detector(cfg):
    """A model that finds each object of the validation images."""
    with DefaultScope.overwrite_default_scope('mmyolo'):
        dataset = DATASETS.build(copy.deepcopy(cfg.val_dataloader.dataset))
    model = yolo_reader()
    model.answers = {sample['data_samples'].img_id: sample['data_samples'].gt_instances
                     for sample in dataset}
    return model


def test_accuracy_of_a_perfect_detector(cfg, detector):
    name, value = evaluate(detector, cfg)
    assert name == 'pascal_voc/mAP' and value == pytest.approx(1.)
    assert isinstance(value, float)
    assert evaluate(detector, cfg, 'pascal_voc/AP75') == ('pascal_voc/AP75', 1.)


def test_accuracy_of_a_real_detector(cfg):
    model = build_detector(cfg)
    model.neck.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    name, value = evaluate(model, cfg)
    assert name == 'pascal_voc/mAP' and 0 <= value < 0.1
    assert modes == {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize('wrap', [
    lambda data: dict(type='mmengine.ConcatDataset', datasets=[data, copy.deepcopy(data)]),
    lambda data: dict(type='mmengine.RepeatDataset', times=2, dataset=data)])
def test_number_of_images_of_a_wrapped_data_set(wrap, cfg, detector):
    """These take no indices; the images are the first ones, as without a limit of the others."""
    expected = evaluate(detector, cfg, num_images=2)
    cfg.val_dataloader.batch_size = 3
    cfg.val_dataloader.dataset = wrap(cfg.val_dataloader.dataset)
    seen = []
    assert evaluate(detector, cfg, num_images=2,
                    progress=lambda *numbers: seen.append(numbers)) == expected
    assert seen == [(1, 1)]


def test_number_of_images(cfg, detector):
    cfg.val_dataloader.batch_size = 1
    seen = []
    evaluate(detector, cfg, num_images=2, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(1, 2), (2, 2)]
    first = min(detector.answers)
    for truth in (truth for key, truth in detector.answers.items() if key != first):
        truth.bboxes.tensor += 1000.
    assert evaluate(detector, cfg, num_images=1)[1] == pytest.approx(1.)
    assert evaluate(detector, cfg, num_images=99)[1] < 0.7
    with pytest.raises(UserError, match='num_images must be at least 1, but is 0'):
        evaluate(detector, cfg, num_images=0)


def write_coco(detector, path):
    """The truth as an annotation file of COCO."""
    annotations = []
    for image_id, truth in detector.answers.items():
        for box, label in zip(truth.bboxes.tensor.tolist(), truth.labels.tolist()):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image_id, category_id=label, iscrowd=0,
                bbox=[box[0], box[1], width, height], area=width * height))
    path.write_text(json.dumps(dict(
        images=[dict(id=key, width=128, height=128) for key in detector.answers],
        annotations=annotations,
        categories=[dict(id=index, name=name) for index, name in enumerate(CLASSES)])))


def test_images_left_out_do_not_count_as_missed(cfg, detector, tmp_path):
    write_coco(detector, tmp_path / 'truth.json')
    cfg.val_evaluator = dict(
        type='mmdet.CocoMetric', ann_file=str(tmp_path / 'truth.json'), metric='bbox')
    name, value = evaluate(detector, cfg, num_images=1)
    assert name == 'coco/bbox_mAP' and value == pytest.approx(1.)


@pytest.fixture(params=['coco', 'voc'])
def blind(request, cfg, detector, tmp_path):
    """A model that finds nothing: itself, the config to evaluate it and the names of metrics."""
    if request.param == 'coco':
        write_coco(detector, tmp_path / 'truth.json')
        cfg.val_evaluator = dict(
            type='mmdet.CocoMetric', ann_file=str(tmp_path / 'truth.json'), metric='bbox')
    names = dict(coco=['coco/bbox_mAP', 'coco/bbox_mAP_50'],
                 voc=['pascal_voc/mAP', 'pascal_voc/AP50', 'pascal_voc/AP75'])[request.param]
    return BlindReader(detector), cfg, names


class BlindReader(nn.Module):
    """Finds nothing."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def val_step(self, data):
        samples = self.detector.val_step(data)
        for sample in samples:
            sample.pred_instances = sample.pred_instances[:0]
        return samples


def test_a_model_that_finds_nothing_has_the_accuracy_0(blind):
    model, cfg, names = blind
    assert evaluate(model, cfg) == (names[0], 0.)
    for name in names:
        assert evaluate(model, cfg, name) == (name, 0.)
    with pytest.raises(UserError, match="there is no metric 'mAP60'; there are " + names[0]):
        evaluate(model, cfg, 'mAP60')


@pytest.mark.parametrize('metric', ['coco/bbox_mAP', None])
def test_untrained_model_and_score_threshold_that_nothing_reaches(cfg, detector, tmp_path, metric):
    write_coco(detector, tmp_path / 'truth.json')
    cfg.val_evaluator = dict(
        type='mmdet.CocoMetric', ann_file=str(tmp_path / 'truth.json'), metric='bbox')
    cfg.model.test_cfg.score_thr = 1.
    assert evaluate(build_detector(cfg), cfg, metric) == ('coco/bbox_mAP', 0.)


class SilentMetric(CountingMetric):
    """Reports nothing."""

    def compute_metrics(self, results):
        return {}


@pytest.mark.parametrize('name', [None, 'test/images'])
def test_evaluator_without_metrics(cfg, detector, name):
    cfg.val_evaluator = dict(type=SilentMetric)
    with pytest.raises(UserError, match='^the val_evaluator of the config reports no metrics$'):
        evaluate(detector, cfg, name)


def test_other_evaluators(cfg, detector):
    metric = dict(type=CountingMetric, prefix='test')
    for evaluator in (metric, [metric], dict(metrics=[metric]),
                      dict(type='Evaluator', metrics=metric)):
        cfg.val_evaluator = evaluator
        assert evaluate(detector, cfg) == ('test/images', 3.)
        assert evaluate(detector, cfg, 'test/classes') == ('test/classes', 4.)


def test_evaluation_is_quiet(cfg, detector, capfd):
    logger = MMLogger.get_current_instance()
    level = logger.level
    evaluate(detector, cfg, progress=lambda done, total: print(f'{done} of {total}'))
    assert capfd.readouterr().out == '1 of 1\n'
    assert logger.level == level


def test_unknown_metric(cfg, detector):
    with pytest.raises(UserError) as caught:
        evaluate(detector, cfg, 'coco/mAP')
    assert str(caught.value).startswith(
        "there is no metric 'coco/mAP'; there are pascal_voc/mAP, pascal_voc/AP50, ")


def test_config_without_evaluator(cfg, detector):
    cfg.pop('val_evaluator')
    with pytest.raises(UserError, match='the config has no val_evaluator'):
        evaluate(detector, cfg)


def test_missing_validation_data(cfg, detector):
    cfg.val_dataloader.dataset.ann_file = 'nowhere.txt'
    with pytest.raises(UserError, match='^the validation data cannot be loaded: .*nowhere.txt'):
        evaluate(detector, cfg)

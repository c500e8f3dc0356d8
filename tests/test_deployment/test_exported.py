# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from pruning_samples import randomise

from mmgcp.datasets.calibration import evaluate
from mmgcp.deployment import (
    ExportedModel,
    ExportOptions,
    evaluate_exported,
    export_detector,
    open_exported,
)
from mmgcp.deployment.exported import FORMATS, ExportedDetector, is_installed, require
from mmgcp.deployment.predictions import nested
from mmgcp.errors import UserError
from mmgcp.utils.config import build_detector, with_fixed_size


@pytest.fixture
def means(monkeypatch):
    """A file that emits the mean of each image, three images at a time."""
    monkeypatch.setattr('mmgcp.deployment.exported.FORMATS', dict(FORMATS))

    class Means(ExportedModel):
        suffix, package = '.means', 'torch'
        output_names, input_shape = ['mean'], (3, 2, None, 4)

        def run_batch(self, images):
            assert len(images) == 3 and images.is_contiguous()
            return [images.mean((1, 2, 3))]

    return Means('a.means')


@pytest.mark.parametrize('number', [1, 3, 4, 7])
def test_any_number_of_images(means, number):
    images = torch.rand(number, 2, 5, 4)
    torch.testing.assert_close(means.run(images)['mean'], images.mean((1, 2, 3)))


def test_images_of_another_size(means):
    with pytest.raises(UserError) as caught:
        means.run(torch.rand(1, 2, 5, 6))
    assert str(caught.value) == ('a.means takes images of 2 channels and any x 4 pixels (height x '
                                 'width), but these have 2 channels and 5 x 6 pixels (height x '
                                 'width)')


def test_structure_of_raw_outputs():
    names = ['cls_scores_0', 'cls_scores_1', 'bbox_preds_0', 'bbox_preds_1', 'mask_feats']
    assert nested(dict(zip(names, 'abcde'))) == [['a', 'b'], ['c', 'd'], 'e']


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match='a.txt is none of .onnx, .param, .xml'):
        open_exported('a.txt')
    with pytest.raises(UserError, match='there is no .*a.onnx'):
        open_exported(tmp_path / 'a.onnx')
    for suffix, package in (('onnx', 'onnxruntime'), ('xml', 'openvino'), ('param', 'ncnn')):
        path = tmp_path / f'a.{suffix}'
        path.write_text('no network')
        path.with_suffix('.json').write_text('{')
        installed = is_installed(package)
        reason = f'{tmp_path}/a' if installed else f'{package} is needed to run such files'
        with pytest.raises(UserError, match=reason):
            open_exported(path)
    with pytest.raises(UserError, match='nowhere is needed to fly: pip install nowhere'):
        require('nowhere', 'to fly')


class MeanOfBoxes(BaseMetric):
    """What the boxes are on average: an accuracy would be 0 for random weights."""

    def process(self, data_batch, data_samples):
        self.results += [sample['pred_instances'] for sample in data_samples]

    def compute_metrics(self, results):
        values = [(item['bboxes'] * item['scores'][:, None]).sum() for item in results]
        return dict(number=len(values), mean=float(sum(values)) / len(values))


@pytest.fixture(scope='module')
def setup(modules, write_config, tmp_path_factory):
    """Config and detector with data, and files with raw outputs and with detections."""
    folder = tmp_path_factory.mktemp('exported')
    cfg = Config.fromfile(str(write_config(folder / 'tiny.py')))
    cfg.model.test_cfg.update(score_thr=0.05, nms_pre=100, max_per_img=20)
    METRICS.register_module(module=MeanOfBoxes, force=True)
    cfg.val_evaluator = dict(type='MeanOfBoxes')
    model = randomise(build_detector(cfg)).eval()
    for name, nms in (('raw', False), ('boxes', True)):
        export_detector(model, cfg, folder / f'{name}.onnx', (3, 96, 96), ExportOptions(nms=nms),
                        report=lambda line: None)
    return cfg, model, folder


@pytest.mark.parametrize('name', ['raw', 'boxes'])
def test_accuracy_of_a_file_is_that_of_the_detector(setup, name):
    cfg, model, folder = setup
    _, expected = evaluate(model, cfg, 'mean')
    assert expected > 1
    exported = open_exported(folder / f'{name}.onnx')
    assert evaluate_exported(exported, model, cfg, 'mean') == (
        'mean', pytest.approx(expected, rel=1e-3))
    assert evaluate_exported(exported, model, cfg, num_images=1) == ('number', 1)


@pytest.mark.parametrize('name', ['raw', 'boxes'])
def test_boxes_are_those_of_the_original_image(setup, name):
    """Of a padded and resized one."""
    cfg, model, folder = setup
    meta = dict(ori_shape=(60, 120), img_shape=(96, 96), batch_input_shape=(96, 96),
                pad_param=(24, 24, 0, 0), scale_factor=(0.8, 0.8), img_id=0)
    image = torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)

    def data():
        return dict(inputs=[image], data_samples=[DetDataSample(metainfo=dict(meta))])

    (expected, ) = model.val_step(data())
    detector = ExportedDetector(model, open_exported(folder / f'{name}.onnx'))
    (found, ) = detector.val_step(data())
    expected, found = expected.pred_instances, found.pred_instances
    assert len(expected) == len(found) > 3
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
    same = (found.bboxes - expected.bboxes).abs().amax(1) < 1e-2
    assert same.float().mean() > 0.9
    assert found.bboxes[:, 0::2].max() <= 120 and found.bboxes[:, 1::2].max() <= 60


def test_one_size_of_validation_images():
    cfg = Config(dict(val_dataloader=dict(dataset=dict(
        batch_shapes_cfg=dict(img_size=640), pipeline=[dict(type='A', size=3)]))))
    changed = with_fixed_size(cfg)
    assert changed.val_dataloader.dataset == ConfigDict(
        batch_shapes_cfg=None, pipeline=[dict(type='A', size=3)])
    assert cfg.val_dataloader.dataset.batch_shapes_cfg == dict(img_size=640)

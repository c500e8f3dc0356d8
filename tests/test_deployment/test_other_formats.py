# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""OpenVINO and ncnn, where their packages are installed."""
import importlib.util
import json

import pytest
import torch
from deployment_samples import narrow_config, narrow_detector

from mmgcp.deployment import ExportOptions, export_detector, open_exported
from mmgcp.deployment.check import sample_images
from mmgcp.errors import UserError
from mmgcp.nn.forward import flatten_tensors

NAMES = ['yolov5-n', 'rtmdet-tiny']


def export(name, path, format_, ratio=0., **options):
    cfg = narrow_config(name)
    model = narrow_detector(cfg, ratio)
    result = export_detector(model, cfg, path, (3, 64, 96),
                             ExportOptions(format=format_, **options), report=lambda line: None)
    assert result.difference < 1e-4
    return model


def assert_same_outputs(model, exported, images):
    with torch.no_grad():
        expected = flatten_tensors(model(images, mode='tensor'))
    found = exported.run(images)
    assert len(found) == len(expected)
    for output, wanted in zip(found.values(), expected):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', NAMES)
def test_openvino(name, tmp_path):
    pytest.importorskip('openvino')
    model = export(name, tmp_path / 'a.xml', 'openvino', ratio=0.4, dynamic='batch')
    assert {path.name for path in tmp_path.iterdir()} == {'a.xml', 'a.bin'}
    exported = open_exported(tmp_path / 'a.xml')
    assert exported.metadata['strides'] == [8, 16, 32]
    assert exported.input_shape == (None, 3, 64, 96)
    assert_same_outputs(model, exported, sample_images(model, (3, 3, 64, 96), seed=5))


def test_openvino_with_nms(tmp_path):
    pytest.importorskip('openvino')
    export('yolov5-n', tmp_path / 'a.xml', 'openvino', nms=True, batch=2)
    assert open_exported(tmp_path / 'a.xml').output_names == ['boxes', 'scores', 'labels']


@pytest.mark.parametrize('name', NAMES)
def test_ncnn(name, tmp_path):
    pytest.importorskip('ncnn')
    pytest.importorskip('pnnx')
    model = export(name, tmp_path / 'a.param', 'ncnn', ratio=0.4)
    assert {path.name for path in tmp_path.iterdir()} == {'a.param', 'a.bin', 'a.json'}
    assert json.loads((tmp_path / 'a.json').read_text())['input_size'] == [96, 64]
    exported = open_exported(tmp_path / 'a.param')
    assert_same_outputs(model, exported, sample_images(model, (2, 3, 64, 96), seed=5))


@pytest.mark.parametrize('package, format_, suffix', [
    ('openvino', 'openvino', 'xml'), ('pnnx', 'ncnn', 'param')])
def test_missing_package(package, format_, suffix, tmp_path):
    if importlib.util.find_spec(package):
        pytest.skip(f'{package} is installed')
    with pytest.raises(UserError) as caught:
        export('yolov5-n', tmp_path / f'a.{suffix}', format_)
    assert str(caught.value) == (f'{package} is needed to write such files: '
                                 f'pip install {package}')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('options, reason', [
    (dict(format='ncnn', nms=True), 'ncnn has no NMS: export the raw outputs'),
    (dict(format='ncnn', dynamic='size'), 'ncnn files take one image of one size'),
    (dict(format='openvino', int8=True), 'int8 goes with ONNX files only, not with openvino'),
    (dict(format='tensorrt'), "format must be one of .*, but is 'tensorrt'"),
    (dict(batch=0), 'batch must be an integer from 1 to'),
    (dict(opset=18), 'opset must be an integer from 11 to 17, but is 18'),
    (dict(tolerance=0), 'tolerance must be a number in'),
    (dict(dynamic=True), 'dynamic must be one of')])
def test_options(options, reason):
    with pytest.raises(UserError, match=reason):
        ExportOptions(**options)

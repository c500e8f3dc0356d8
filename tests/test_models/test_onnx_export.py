# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import inspect
import warnings

import onnxruntime
import pytest
import torch
import torch.nn as nn

from mmgcp.pruning import prune


class RawPredictions(nn.Module):
    """A detector whose outputs are a flat tuple."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        return tuple(level for kind in self.detector(images, mode='tensor') for level in kind)


def run_exported(model, images, path):
    options = dict(opset_version=13, input_names=['images'])
    if 'dynamo' in inspect.signature(torch.onnx.export).parameters:
        options['dynamo'] = False
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(model, (images, ), str(path), **options)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return session.run(None, dict(images=images.numpy()))


@pytest.mark.parametrize('ratio', [0, 0.4])
def test_same_predictions(tiny_detector, tmp_path, ratio):
    detector = tiny_detector().eval()
    parameters = sum(parameter.numel() for parameter in detector.parameters())
    if ratio:
        groups = [dict(name='all', modules=['backbone', 'neck', 'bbox_head'], ratio=ratio)]
        prune(detector, groups, input_shape=(3, 64, 64))
        assert sum(item.numel() for item in detector.parameters()) < 0.8 * parameters
    model = RawPredictions(detector).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(images)
    outputs = run_exported(model, images, tmp_path / 'model.onnx')
    assert [output.shape for output in outputs] == [
        (2, channels, 64 // stride, 96 // stride) for channels in (9, 12, 3)
        for stride in (8, 16, 32)
    ]
    for output, wanted in zip(outputs, expected):
        assert wanted.std() > 1e-3
        torch.testing.assert_close(torch.from_numpy(output), wanted, rtol=1e-4, atol=1e-4)

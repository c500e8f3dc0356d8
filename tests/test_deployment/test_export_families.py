# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
"""Every family, original and pruned: the file computes what PyTorch does."""
import onnxruntime
import pytest
import torch
from deployment_samples import (
    MMYOLO,
    ONE_STAGE,
    REPRESENTATIVES,
    WITHOUT_BOXES,
    narrow_config,
    narrow_detector,
)
from tiers import slow_except

from mmgcp.deployment import ExportOptions, export_detector
from mmgcp.deployment.check import predict, sample_images
from mmgcp.errors import UserError
from mmgcp.nn.forward import flatten_tensors

# Ratio of pruning, whether with NMS, and what is left open
CASES = {'original': (0, False, 'none'), 'original-nms': (0, True, 'both'),
         'pruned': (0.4, False, 'batch'), 'pruned-nms': (0.4, True, 'none')}
MORE_CASES = {f'{ratio}-{"nms" if nms else "raw"}-{dynamic}': (ratio, nms, dynamic)
              for ratio in (0, 0.4) for nms in (False, True)
              for dynamic in ('none', 'batch', 'size', 'both')}


def run_file(path, images):
    """The outputs of a file, by nothing of mmgcp."""
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return [torch.from_numpy(item) for item in session.run(None, dict(images=images.numpy()))]


def assert_same_boxes(outputs, expected, most):
    """The best boxes of each image are those that are expected, and zeros come behind them.

    But for a few of which rounding decides, as NMS goes by the order of scores.
    """
    for boxes, scores, labels, item in zip(*outputs, expected):
        number = min(most, len(item.scores))
        assert number > 3 and abs(int((labels >= 0).sum()) - number) <= 1
        none = labels < 0
        assert (boxes[none] == 0).all() and (scores[none] == 0).all()
        assert (scores[:-1] >= scores[1:]).all()
        apart = (boxes[:, None] - item.bboxes[None, :most]).abs().amax(-1)
        apart = torch.max(apart, 100 * (scores[:, None] - item.scores[None, :most]).abs())
        apart[labels[:, None] != item.labels[None, :most]] = 1e9
        assert (apart.amin(0) < 1e-2).float().mean() > 0.85


def export_and_compare(name, folder, ratio, nms, dynamic):
    cfg = narrow_config(name)
    model = narrow_detector(cfg, ratio)
    stride = max(getattr(model.bbox_head, 'featmap_strides', [32]))
    shape = (3, stride, 2 * stride) if 'ssd300' not in name else (3, 300, 300)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    path = folder / f'{name}-{ratio}-{nms}-{dynamic}.onnx'
    options = ExportOptions(nms=nms, dynamic=dynamic, batch=2 if dynamic == 'none' else 1)
    result = export_detector(model, cfg, path, shape, options, report=lambda line: None)
    assert result.difference < 1e-4 and [item.name for item in folder.iterdir()] == [path.name]
    for key, value in model.state_dict().items():  # the detector is what it was
        assert torch.equal(value, state.pop(key))
    assert not state
    batch = dict(none=2, size=1).get(dynamic, 3)
    height = shape[1] + (stride if dynamic in ('size', 'both') else 0)
    images = sample_images(model, (batch, 3, height, shape[2]), seed=7)
    outputs = run_file(path, images)
    path.unlink()
    if nms:
        test_cfg = model.bbox_head.test_cfg
        assert_same_boxes(outputs, predict(model, images, test_cfg), test_cfg.max_per_img)
        return
    with torch.no_grad():
        expected = flatten_tensors(model(images, mode='tensor'))
    assert len(outputs) == len(expected) and max(item.std() for item in expected) > 1e-2
    for output, wanted in zip(outputs, expected):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('case', slow_except(['original-nms', 'pruned', 'pruned-nms'], CASES))
@pytest.mark.parametrize('name', slow_except(REPRESENTATIVES, MMYOLO))
def test_same_predictions(name, case, tmp_path):
    ratio, nms, dynamic = CASES[case]
    if nms and name in WITHOUT_BOXES:
        with pytest.raises(UserError, match='cannot be decoded in the file: export the raw'):
            export_and_compare(name, tmp_path, ratio, nms, dynamic)
        return
    export_and_compare(name, tmp_path, ratio, nms, dynamic)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('case', MORE_CASES)
@pytest.mark.parametrize('name', REPRESENTATIVES)
def test_same_predictions_however_they_are_exported(name, case, tmp_path):
    export_and_compare(name, tmp_path, *MORE_CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize('ratio', slow_except([0.3], [0, 0.3]))
@pytest.mark.parametrize('name', ONE_STAGE)
def test_raw_outputs_of_mmdetection(name, ratio, tmp_path):
    export_and_compare(name, tmp_path, ratio, False, 'none')


@pytest.mark.parametrize('name, nms, reason', [
    ('faster-rcnn-r50', False, 'a FasterRCNN cannot be exported: only detectors of one stage can'),
    ('ssdlite', True, 'the predictions of a SSDHead cannot be decoded in the file'),
])
def test_what_cannot_be_exported(name, nms, reason, tmp_path):
    cfg = narrow_config(name)
    model = narrow_detector(cfg)
    with pytest.raises(UserError, match=reason):
        export_detector(model, cfg, tmp_path / 'a.onnx', (3, 64, 64), ExportOptions(nms=nms))
    assert not list(tmp_path.iterdir())

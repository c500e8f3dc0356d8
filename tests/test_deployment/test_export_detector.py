# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
from deployment_samples import narrow_config, narrow_detector
from tiers import slow_except

from mmgcp.deployment import ExportOptions, export_detector
from mmgcp.deployment import predictions as predictions_module
from mmgcp.deployment.candidates import decode
from mmgcp.errors import UserError


@pytest.mark.parametrize('score_thr', slow_except([0.9999], [0.05, 0.9999]))
def test_wrong_boxes_are_noticed(score_thr, tmp_path, monkeypatch):
    """Also where the detector finds nothing in the images that are compared."""
    cfg = narrow_config('yolov5-n')
    cfg.model.test_cfg.score_thr = score_thr
    model, lines = narrow_detector(cfg), []
    options = ExportOptions(nms=True)
    result = export_detector(model, cfg, tmp_path / 'a.onnx', (3, 64, 64), options,
                             report=lines.append)
    assert 0 < result.difference < 1e-4 and result.files == [tmp_path / 'a.onnx']
    assert lines == [f'largest difference from PyTorch: {result.difference:.1e}',
                     f'written to {tmp_path / "a.onnx"}']

    def shifted(*args):
        boxes, scores, objectness = decode(*args)
        return boxes + 5, scores, objectness

    monkeypatch.setattr(predictions_module, 'decode', shifted)
    with pytest.raises(UserError, match='it has not been kept'):
        export_detector(model, cfg, tmp_path / 'b.onnx', (3, 64, 64), options,
                        report=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']

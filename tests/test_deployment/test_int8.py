# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import onnx
import pytest
import torch
from mmengine.config import Config
from onnx import TensorProto, helper
from pruning_samples import randomise
from tiers import slow_except

from mmgcp.deployment import ExportOptions, export_detector, open_exported
from mmgcp.deployment.check import sample_images
from mmgcp.deployment.int8 import _Reader, quantised_nodes
from mmgcp.errors import UserError
from mmgcp.utils.config import build_detector, load_config


def test_nodes_between_images_and_last_convolutions(tmp_path):
    """Not the prediction, nor what follows it."""
    steps = [('Conv', 'a'), ('Sigmoid', 'b'), ('Mul', 'c'), ('Conv', 'd'), ('Relu', 'e')]
    nodes = [helper.make_node(kind, [f'x{number}'] + ([f'x{number - 1}'] if kind == 'Mul' else []),
                              [f'x{number + 1}'], name=name)
             for number, (kind, name) in enumerate(steps)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ('x0', 'x5')]
    path = tmp_path / 'a.onnx'
    onnx.save(helper.make_model(helper.make_graph(nodes, 'g', values[:1], values[1:])), str(path))
    assert quantised_nodes(path) == ['a', 'b', 'c']


def test_batches_for_calibration():
    reader = _Reader([torch.rand(3, 3, 8, 8), torch.rand(2, 3, 4, 6)], 2, (8, 8))
    shapes = [item['images'].shape for item in iter(reader.get_next, None)]
    assert shapes == [(2, 3, 8, 8), (2, 3, 8, 8)] and len(reader) == 2
    reader.set_range(1, 2)
    assert len(list(iter(reader.get_next, None))) == 1
    with pytest.raises(UserError, match='there are no training images'):
        _Reader([], 1, (8, 8))


@pytest.mark.parametrize('nms', slow_except([False], [False, True], pytest.mark.slow))
def test_file_with_integers(write_config, tmp_path, nms):
    """It is smaller, near the other one, and measured beside it."""
    cfg = Config.fromfile(str(write_config(tmp_path / 'tiny.py')))
    cfg.model.test_cfg.update(score_thr=0.05, nms_pre=100, max_per_img=20)
    model, lines = randomise(build_detector(cfg)).eval(), []
    options = ExportOptions(int8=True, nms=nms, calib_batches=2, val_images=2)
    result = export_detector(model, cfg, tmp_path / 'a.onnx', (3, 96, 96), options,
                             report=lines.append)
    assert [path.name for path in result.files] == ['a.onnx', 'a-int8.onnx']
    assert {path.name for path in tmp_path.iterdir()} == {'tiny.py', 'a.onnx', 'a-int8.onnx'}
    fp32, int8 = result.files
    assert int8.stat().st_size < 0.5 * fp32.stat().st_size
    assert set(result.accuracy) == {'PyTorch', 'a.onnx', 'a-int8.onnx'}
    assert result.accuracy['a.onnx'] == pytest.approx(result.accuracy['PyTorch'], abs=1e-3)
    assert lines[-1].startswith('pascal_voc/') and 'a-int8.onnx 0.' in lines[-1]
    kinds = [node.op_type for node in onnx.load(str(int8)).graph.node]
    assert kinds.count('QuantizeLinear') > 20
    images = sample_images(model, (1, 3, 96, 96), seed=3)
    files = [open_exported(path) for path in result.files]
    assert files[1].metadata == dict(files[0].metadata, precision='int8')
    if not nms:
        for name, value in files[0].run(images).items():
            found = files[1].run(images)[name]
            assert 0 < (found - value).abs().mean() < 0.25 * value.std()


def test_missing_data(config_files, tmp_path):
    """Of a detector whose data are nowhere: the int8 file fails, the other one is kept."""
    cfg = load_config(str(config_files[0]))
    model, lines = build_detector(cfg).eval(), []
    with pytest.raises(UserError, match='the calibration images cannot be loaded'):
        export_detector(model, cfg, tmp_path / 'a.onnx', (3, 64, 64), ExportOptions(int8=True),
                        report=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']
    with pytest.raises(UserError, match='the validation data cannot be loaded'):
        export_detector(model, cfg, tmp_path / 'a.onnx', (3, 64, 64), ExportOptions(val_images=1),
                        report=lines.append)

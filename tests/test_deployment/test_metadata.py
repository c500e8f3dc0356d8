# Copyright (c) The mmgcp authors. Licensed under Apache-2.0.
import pytest
from deployment_samples import narrow_config, narrow_detector
from mmengine.config import Config
from onnx import TensorProto, checker, helper, load, save

from mmgcp.deployment.metadata import class_names, describe, from_text, set_onnx_metadata, to_text
from mmgcp.deployment.onnx_format import OnnxModel
from mmgcp.version import __version__


def write_identity(path):
    """The smallest file there is."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ('n', 1, 2, 2))
               for name in ('images', 'same')]
    graph = helper.make_graph([helper.make_node('Identity', ['images'], ['same'])], 'g',
                              tensors[:1], tensors[1:])
    save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid('', 13)]),
         str(path))


def test_file_keeps_metadata(tmp_path):
    """Also long values and letters that need several bytes."""
    path = tmp_path / 'a.onnx'
    write_identity(path)
    metadata = dict(classes=['Ä', 'b' * 1000, '1'], mean=[0.5, 1.0], detector='YOLODetector',
                    nothing=None, number='7x')
    set_onnx_metadata(path, metadata)
    set_onnx_metadata(path, metadata)
    checker.check_model(load(str(path)))
    assert len(load(str(path)).metadata_props) == len(metadata)
    exported = OnnxModel(path)
    assert exported.metadata == metadata
    assert exported.input_shape == (None, 1, 2, 2) and exported.output_names == ['same']


def test_text():
    metadata = dict(a='text', b=[1, 2.5], c=None, d='RGB')
    assert from_text(to_text(metadata)) == metadata


def test_description():
    cfg = narrow_config('rtmdet-tiny')
    model = narrow_detector(cfg)
    found = describe(model, cfg, dict(dataset_meta=dict(classes=('a', 'b', 'c'))), (3, 64, 96),
                     'raw')
    assert found == dict(
        classes=['a', 'b', 'c'], input_size=[96, 64], mean=pytest.approx([103.53, 116.28, 123.675]),
        std=pytest.approx([57.375, 57.12, 58.395]), color_order='BGR', strides=[8, 16, 32],
        outputs='raw', detector='YOLODetector', head='RTMDetHead', mmgcp_version=__version__)


def config(**dataset):
    return Config(dict(default_scope='mmyolo', test_dataloader=dict(dataset=dataset)))


@pytest.mark.parametrize('meta, dataset, names', [
    (dict(dataset_meta=dict(CLASSES=('a', 'b'))), {}, ['a', 'b']),
    (dict(CLASSES=('a', 'b')), {}, ['a', 'b']),
    (dict(dataset_meta={}), dict(metainfo=dict(classes=['c', 'd'])), ['c', 'd']),
    (dict(dataset_meta=dict(classes=('a', 'b', 'c'))), dict(metainfo=dict(classes=['c', 'd'])),
     ['c', 'd']),  # those of the checkpoint are three
    ({}, dict(type='A', datasets=[dict(metainfo=dict(classes=['c', 'd']))]), ['c', 'd']),
    ({}, dict(type='YOLOv5CocoDataset', pipeline=[]), None), ({}, {}, None)])
def test_class_names(meta, dataset, names):
    assert class_names(config(**dataset), meta, 2) == names


def test_class_names_of_a_data_set():
    names = class_names(config(type='YOLOv5CocoDataset', pipeline=[dict(type='LetterResize')]),
                        {}, 80)
    assert names[:2] == ['person', 'bicycle'] and len(names) == 80
